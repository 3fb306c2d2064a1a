"""How long each run's training workers hold their places while no step is taken.

A worker holds its place from when it has a node until it has ended or its pod is gone. An attempt trains from its first
reported step to its last; everything before and after is idle: start, rendezvous, a hang, the exit.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from e2e.harness import Platform, trains
from internvl_api.constants import GROUP, LABEL_ATTEMPT, LABEL_JOB, LABEL_STAGE, PLURAL, VERSION
from ivft_demo.follow import read_status
from kubernetes import client
from urllib3.exceptions import HTTPError

EVERY = 0.5  # seconds between two looks

Span = tuple[float, float]


class Idle(NamedTuple):
    """Seconds of the longest time without a step in which workers held places, and the sum over these workers."""

    longest: float
    worker_seconds: float


class RunKey(NamedTuple):
    namespace: str
    name: str


@dataclass
class Worker:
    """A pod of training. `placed`: the time in which it was seen with a node and not ended; empty before."""

    attempt: int
    seen: Span
    placed: list[float] = field(default_factory=list)
    ran: bool = False


@dataclass
class Attempt:
    """When an attempt reported its first and its last step."""

    step: int
    first: float
    last: float


def idle(held: Sequence[Span], trained: Iterable[Span]) -> Idle:
    """The time in `held` that is not in `trained`.

    >>> idle([(0.0, 30.0), (5.0, 30.0)], [(10.0, 25.0)])
    Idle(longest=10.0, worker_seconds=25.0)
    """
    spans = [span for span in trained if span[0] < span[1]]
    edges = sorted({edge for span in (*held, *spans) for edge in span})
    longest = current = total = 0.0
    for begin, end in itertools.pairwise(edges):
        workers = sum(first <= begin and end <= last for first, last in held)
        if workers and not any(first <= begin and end <= last for first, last in spans):
            current += end - begin
            total += workers * (end - begin)
        else:
            current = 0.0
        longest = max(longest, current)
    return Idle(longest, total)


class Holds:
    """Looks at all runs and their training workers in all namespaces, until it is stopped."""

    def __init__(self, platform: Platform) -> None:
        self._core, self._custom = platform.core, platform.custom
        self._workers: dict[RunKey, dict[str, Worker]] = defaultdict(dict)
        self._attempts: dict[RunKey, dict[int, Attempt]] = defaultdict(dict)
        self._ended: dict[RunKey, dict[int, str]] = defaultdict(dict)
        self._stopped = threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def idle(self, run: RunKey) -> Idle:
        """How long the run's workers held places without training."""
        held = [(each.placed[0], each.placed[-1]) for each in self._workers[run].values() if each.placed]
        return idle(held, [(each.first, each.last) for each in self._attempts[run].values()])

    def in_vain(self, namespace: str, size: int) -> list[float]:
        """Seconds for which each worker existed whose group of `size` workers never ran as a whole."""
        found = []
        for run, workers in self._workers.items():
            for attempt in {each.attempt for each in workers.values()} if run.namespace == namespace else ():
                group = [each for each in workers.values() if each.attempt == attempt]
                if sum(each.ran for each in group) < size:
                    found += [each.seen[1] - each.seen[0] for each in group]
        return found

    def table(self) -> str:
        """A line for each run: reasons of its ended attempts, longest hold in seconds, worker-seconds."""
        lines = []
        for run in sorted(self._workers):
            reasons = ", ".join(reason for _, reason in sorted(self._ended[run].items()))
            longest, total = self.idle(run)
            lines.append(f"{'/'.join(run):40} {longest:6.1f} {total:8.1f}  {reasons}")
        return "\n".join([f"{'run':40} {'hold':>6} {'worker-s':>8}  attempts ended by", *lines])

    def _follow(self) -> None:
        selector = f"{LABEL_STAGE}=train"
        while not self._stopped.wait(EVERY):
            with contextlib.suppress(HTTPError, client.ApiException):  # the API server may be down
                pods = self._core.list_pod_for_all_namespaces(label_selector=selector).items
                runs = self._custom.list_cluster_custom_object(GROUP, VERSION, PLURAL)["items"]
                now = time.monotonic()
                for pod in pods:
                    self._note_pod(pod, now)
                for resource in runs:
                    self._note_run(resource, now)

    def _note_pod(self, pod: Any, now: float) -> None:
        labels = pod.metadata.labels
        run = RunKey(pod.metadata.namespace, labels[LABEL_JOB])
        attempt = int(labels[LABEL_ATTEMPT])
        worker = self._workers[run].setdefault(pod.metadata.uid, Worker(attempt, (now, now)))
        worker.seen = worker.seen[0], now
        worker.ran |= pod.status.phase in ("Running", "Succeeded")
        if pod.spec.node_name and pod.status.phase in ("Pending", "Running"):
            worker.placed.append(now)

    def _note_run(self, resource: dict[str, Any], now: float) -> None:
        status, run = read_status(resource), RunKey(resource["metadata"]["namespace"], resource["metadata"]["name"])
        for entry in status.stages:
            if entry.name == "train":
                ended = {each.number: each.reason or "" for each in entry.attempts or () if each.finished_at}
                self._ended[run].update(ended)
        step = status.progress.step if status.progress else None
        if not trains(status) or step is None:
            return
        known = self._attempts[run].setdefault(status.attempt, Attempt(step, now, now))
        if step != known.step:
            known.step, known.last = step, now

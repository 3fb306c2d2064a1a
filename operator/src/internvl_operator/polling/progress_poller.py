"""Poll /progress of node rank 0 of every running group, at a bounded rate; missing answers are tolerated."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from internvl_api.constants import METRICS_PORT

from internvl_operator.core.observe import LiveProgress
from internvl_operator.core.run import Key
from internvl_operator.core.telemetry import Answer, read_answer
from internvl_operator.polling import pod_request
from internvl_operator.polling.fair_queue import FairQueue

_LONGEST_INTERVAL = 60.0  # seconds between two requests to a pod that does not answer


@dataclass
class _Target:
    pod_uid: str
    address: str
    interval: float


class ProgressPoller:
    """Call `follow` or `forget` after every pass; `changed` is called when a run's progress changes."""

    def __init__(self, changed: Callable[[Key], None], *, interval: float, threads: int) -> None:
        self._changed, self._interval = changed, interval
        self._lock = threading.Lock()
        self._targets: dict[Key, _Target] = {}
        self._latest: dict[Key, LiveProgress] = {}
        self._queue: FairQueue[Key] = FairQueue(threads)
        self._threads = [
            threading.Thread(target=self._queue.serve, args=(self._ask,), name=f"progress-{n}", daemon=True)
            for n in range(threads)
        ]

    def start(self) -> None:
        """Start polling."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop polling."""
        self._queue.close()

    def latest(self, key: Key) -> LiveProgress | None:
        """The run's last answer; None before the first."""
        with self._lock:
            return self._latest.get(key)

    def follow(self, key: Key, pod_uid: str, address: str) -> None:
        """Poll this pod from now on."""
        with self._lock:
            known = self._targets.get(key)
            if known and known.pod_uid == pod_uid:
                return
            self._targets[key] = _Target(pod_uid, address, self._interval)
        self._queue.add(key, after=self._interval)

    def forget(self, key: Key) -> None:
        """Stop polling for a run without a running pod."""
        with self._lock:
            self._targets.pop(key, None)
            self._latest.pop(key, None)

    def _ask(self, key: Key) -> None:
        with self._lock:
            target = self._targets.get(key)
        if target is None:
            return
        answer = ask(target.address)
        found = LiveProgress(target.pod_uid, answer.progress, answer.checkpoint) if answer else None
        target.interval = self._interval if found else min(_LONGEST_INTERVAL, target.interval * 2)
        self._queue.add(key, after=target.interval)
        with self._lock:
            if found is None or self._targets.get(key) is not target or self._latest.get(key) == found:
                return
            self._latest[key] = found
        self._changed(key)


def ask(address: str, local_rank: int = 0) -> Answer | None:
    """The answer of one process of a pod; None without a readable answer in time."""
    body = pod_request.get(address, METRICS_PORT + local_rank, "/progress")
    return None if body is None else read_answer(body)

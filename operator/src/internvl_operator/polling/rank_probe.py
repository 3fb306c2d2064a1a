"""Request /progress of every training process of a group once, when the group makes no progress."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from internvl_operator.clock import utc_now
from internvl_operator.core.observe import Pod, ProcessState, RankAnswers
from internvl_operator.core.run import Key
from internvl_operator.polling.fair_queue import FairQueue
from internvl_operator.polling.progress_poller import ask

_LONGEST_PROBE = 20.0  # seconds from the first request of a probe; then the remaining processes count as silent


class _Question(NamedTuple):
    namespace: str
    name: str
    process: int  # its place in the probe


@dataclass
class _Probe:
    asked_at: datetime
    processes: tuple[tuple[Pod, int], ...]
    states: dict[int, ProcessState] = field(default_factory=dict)
    ends: float | None = None


class RankProbe:
    """`ask` returns at once; `changed` is called when all processes have answered or timed out."""

    def __init__(self, changed: Callable[[Key], None], *, threads: int) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._probes: dict[Key, _Probe] = {}
        self._latest: dict[Key, RankAnswers] = {}
        self._queue: FairQueue[_Question] = FairQueue(threads)
        self._threads = [
            threading.Thread(target=self._queue.serve, args=(self._answer,), name=f"rank-probe-{n}", daemon=True)
            for n in range(threads)
        ]

    def start(self) -> None:
        """Start answering `ask`."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop; requests in progress end by their own deadline."""
        self._queue.close()

    def latest(self, key: Key) -> RankAnswers | None:
        """The run's last answers."""
        with self._lock:
            return self._latest.get(key)

    def ask(self, key: Key, pods: Sequence[Pod], processes: int) -> None:
        """Probe `processes` processes of each pod, unless a probe of this run is in progress."""
        everyone = tuple((pod, local_rank) for pod in pods for local_rank in range(processes))
        with self._lock:
            if key in self._probes or not everyone:
                return
            self._probes[key] = _Probe(utc_now(), everyone)
        for index in range(len(everyone)):
            self._queue.add(_Question(key.namespace, key.name, index))

    def forget(self, key: Key) -> None:
        """Drop the answers of a run without a running attempt."""
        with self._lock:
            self._latest.pop(key, None)

    def _answer(self, question: _Question) -> None:
        key = Key(question.namespace, question.name)
        with self._lock:
            probe = self._probes[key]
            probe.ends = probe.ends or time.monotonic() + _LONGEST_PROBE
        pod, local_rank = probe.processes[question.process]
        late = time.monotonic() > probe.ends
        state = ProcessState(pod.rank, local_rank) if late else _state(pod, local_rank)
        with self._lock:
            probe.states[question.process] = state
            if len(probe.states) < len(probe.processes):
                return
            del self._probes[key]
            states = tuple(probe.states[index] for index in range(len(probe.processes)))
            self._latest[key] = RankAnswers(probe.asked_at, frozenset(pod.uid for pod, _ in probe.processes), states)
        self._changed(key)


def _state(pod: Pod, local_rank: int) -> ProcessState:
    answer = ask(pod.ip, local_rank) if pod.ip else None
    if answer is None:
        return ProcessState(pod.rank, local_rank)
    return ProcessState(pod.rank, local_rank, answer.progress, answer.heartbeat)

"""Request /progress of every training process of a group once, when the group makes no progress."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import urllib3

from internvl_operator.core.observe import Pod, ProcessState, RankAnswers
from internvl_operator.core.run import Key
from internvl_operator.polling.progress_poller import ask


class RankProbe:
    """`ask` returns at once; `changed` is called when all processes have answered or timed out."""

    def __init__(self, changed: Callable[[Key], None], *, threads: int) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._asking: set[Key] = set()
        self._latest: dict[Key, RankAnswers] = {}
        self._http = urllib3.PoolManager(num_pools=threads * 2, maxsize=1, retries=False)
        # Two pools: a call waits for its requests and must not occupy their threads.
        self._calls = ThreadPoolExecutor(2, thread_name_prefix="rank-probe")
        self._questions = ThreadPoolExecutor(threads, thread_name_prefix="rank-probe-question")

    def stop(self) -> None:
        """Stop; requests in progress end by their own time-out."""
        self._calls.shutdown(wait=False, cancel_futures=True)
        self._questions.shutdown(wait=False, cancel_futures=True)

    def latest(self, key: Key) -> RankAnswers | None:
        """The run's last answers."""
        with self._lock:
            return self._latest.get(key)

    def ask(self, key: Key, pods: Sequence[Pod], processes: int) -> None:
        """Probe `processes` processes of each pod, unless a probe of this run is in progress."""
        with self._lock:
            if key in self._asking:
                return
            self._asking.add(key)
        self._calls.submit(self._call, key, tuple(pods), processes)

    def forget(self, key: Key) -> None:
        """Drop the answers of a run without a running attempt."""
        with self._lock:
            self._latest.pop(key, None)

    def _call(self, key: Key, pods: tuple[Pod, ...], processes: int) -> None:
        try:
            asked_at = datetime.now(UTC)
            everyone = [(pod, local_rank) for pod in pods for local_rank in range(processes)]
            states = tuple(self._questions.map(lambda one: self._state(*one), everyone))
            with self._lock:
                self._latest[key] = RankAnswers(asked_at, frozenset(pod.uid for pod in pods), states)
        finally:
            with self._lock:
                self._asking.discard(key)
        self._changed(key)

    def _state(self, pod: Pod, local_rank: int) -> ProcessState:
        answer = ask(self._http, pod.ip, local_rank) if pod.ip else None
        if answer is None:
            return ProcessState(pod.rank, local_rank)
        return ProcessState(pod.rank, local_rank, answer.progress, answer.heartbeat)

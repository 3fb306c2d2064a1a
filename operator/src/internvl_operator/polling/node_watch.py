"""Watch nodes that may be lost: is the node's Lease renewed, and do its pods answer?

No clock of another machine is compared: a Lease counts as renewed when it changed between two reads of this process.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from internvl_operator.core.observe import Pod, Silence
from internvl_operator.core.policies import lost_nodes
from internvl_operator.core.run import Key
from internvl_operator.polling.progress_poller import ask

logger = logging.getLogger(__name__)
_EVERY = 2.0  # seconds between two looks
_PACE = 0.02  # seconds between two reads of Leases: at most fifty a second


Renewal = tuple[str, float]  # a value that changes with each renewal of a Lease, and seconds between two of them


@dataclass
class _Lease:
    renewal: Renewal
    changed: float
    read: float


@dataclass
class _Suspect:
    pod: Pod
    heard: float  # when it last answered, at first when it became a suspect


class NodeWatch:
    """`follow` replaces the suspects of a run; `changed` is called when one of them has become silent for long enough.

    `renewal`: reads the Lease of a node; None when it cannot be read, which is no evidence.
    """

    def __init__(
        self,
        changed: Callable[[Key], None],
        renewal: Callable[[str], Renewal | None],
        *,
        threads: int,
        answers: Callable[[Pod], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._changed, self._renewal, self._threads = changed, renewal, threads
        self._answers, self._clock = answers or _answers, clock
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._suspects: dict[Key, dict[str, _Suspect]] = {}
        self._leases: dict[str, _Lease] = {}
        self._thread = threading.Thread(target=self._serve, name="node-watch", daemon=True)

    def start(self) -> None:
        """Start looking."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; requests in progress end by their own deadline."""
        self._ended.set()

    def follow(self, key: Key, pods: Sequence[Pod]) -> None:
        """Watch these pods of the run, and no others of it, from now on."""
        with self._lock:
            known, now = self._suspects.get(key, {}), self._clock()
            if pods:
                self._suspects[key] = {pod.uid: known.get(pod.uid) or _Suspect(pod, now) for pod in pods}
            else:
                self._suspects.pop(key, None)

    def silences(self, key: Key) -> dict[str, Silence]:
        """By uid of a pod: how long the pod and its node have been silent."""
        with self._lock:
            suspects = self._suspects.get(key, {}).values()
            return {each.pod.uid: silence for each in suspects if (silence := self._silence(each))}

    def look(self) -> None:
        """Read the Leases of all suspects, and ask those whose node has not renewed its Lease since the last look."""
        with self._lock:
            before = {key: self._silent(each.values()) for key, each in self._suspects.items()}
            suspects = [each for of_run in self._suspects.values() for each in of_run.values()]
        nodes = {each.pod.node for each in suspects if each.pod.node}
        self._leases = {node: lease for node, lease in self._leases.items() if node in nodes}
        for node in sorted(nodes):
            self._read(node)
            if len(nodes) > 1 and self._ended.wait(_PACE):
                return
        quiet = [each for each in suspects if self._is_quiet(each)]
        with ThreadPoolExecutor(self._threads, thread_name_prefix="suspect") as pool:
            for each, answered in zip(quiet, pool.map(self._answers, [each.pod for each in quiet]), strict=True):
                if answered:
                    each.heard = self._clock()
        with self._lock:
            news = [key for key, each in self._suspects.items() if self._silent(each.values()) - before.get(key, set())]
        for key in news:
            self._changed(key)

    def _serve(self) -> None:
        while not self._ended.wait(_EVERY):
            if self._suspects:
                try:
                    self.look()
                except Exception:  # one failure must not end the thread
                    logger.exception("unexpected error in a look at nodes")

    def _read(self, node: str) -> None:
        renewal, now, known = self._renewal(node), self._clock(), self._leases.get(node)
        if renewal is None:
            return
        if known is None or known.renewal[0] != renewal[0]:
            self._leases[node] = _Lease(renewal, now, now)
        else:
            known.read = now

    def _is_quiet(self, suspect: _Suspect) -> bool:
        lease = self._leases.get(suspect.pod.node or "")
        return lease is not None and lease.read > lease.changed

    def _silence(self, suspect: _Suspect) -> Silence | None:
        lease = self._leases.get(suspect.pod.node or "")
        if lease is None:
            return None
        return Silence(max(0.0, lease.read - max(lease.changed, suspect.heard)), lease.renewal[1])

    def _silent(self, suspects: Iterable[_Suspect]) -> set[str]:
        return {each.pod.uid for each in suspects if lost_nodes.is_silent(self._silence(each))}


def _answers(pod: Pod) -> bool:
    return pod.ip is not None and ask(pod.ip) is not None

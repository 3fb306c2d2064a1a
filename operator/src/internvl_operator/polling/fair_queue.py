"""A work queue that shares its threads fairly between namespaces."""

import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

from internvl_operator.work_queue import WorkQueue


class Namespaced(Hashable, Protocol):
    """A key of work for a namespace."""

    @property
    def namespace(self) -> str:
        """The namespace."""


N = TypeVar("N", bound=Namespaced)


class FairQueue(WorkQueue[N]):
    """Takes the namespaces in turn, and skips one whose work occupies half of the threads already.

    Slow pods of one namespace then delay another by the time of one request, and never occupy every thread.
    """

    def __init__(self, threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._share = max(1, threads // 2)
        self._turns: dict[str, deque[N]] = {}  # ready keys; the first namespace is the next
        self._running: dict[str, int] = {}

    def done(self, key: N) -> None:
        """Mark the work on `key` as ended; its namespace has room for more."""
        with self._changed:
            self._running[key.namespace] -= 1
            if not self._running[key.namespace]:
                del self._running[key.namespace]
            super().done(key)
            self._changed.notify()

    def __len__(self) -> int:
        return sum(len(keys) for keys in self._turns.values())

    def _push(self, key: N) -> None:
        self._turns.setdefault(key.namespace, deque()).append(key)

    def _pop(self) -> N | None:
        namespace = next((name for name in self._turns if self._running.get(name, 0) < self._share), None)
        if namespace is None:
            return None
        keys = self._turns.pop(namespace)
        key = keys.popleft()
        if keys:
            self._turns[namespace] = keys  # at the end
        self._running[namespace] = self._running.get(namespace, 0) + 1
        return key

"""A queue of keys, each at most once in the queue and once in progress, now or after a delay."""

import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable
from threading import Condition
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
_LONGEST_PAUSE = 3600.0  # seconds; Python refuses to wait for a few hundred years, which a deadline of a run may be

logger = logging.getLogger(__name__)


def doubling(first: float, longest: float, failures: int) -> float:
    """Seconds to wait after the n-th failure in a row: `first`, twice as long each time, at most `longest`."""
    return min(longest, first * 2.0 ** min(failures - 1, 20))


class WorkQueue(Generic[K]):
    """Between `get` and `done` a key belongs to one thread; a key added meanwhile follows after `done`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = Condition()
        self._ready: deque[K] = deque()
        self._waiting: set[K] = set()  # in _ready, or to be put there when done
        self._busy: set[K] = set()
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._sequence = 0
        self._closed = False

    def add(self, key: K, after: float = 0.0) -> None:
        """Queue `key`, at the latest after this many seconds."""
        with self._changed:
            if after > 0:
                self._delay(key, self._clock() + after)
            else:
                self._make_ready(key)
            self._changed.notify()

    def get(self) -> K | None:
        """The next key; None once the queue is closed. An earlier delay of the key is cancelled."""
        with self._changed:
            while not self._closed:
                pause = self._promote()
                if (key := self._pop()) is not None:
                    self._waiting.discard(key)
                    self._busy.add(key)
                    self._due.pop(key, None)
                    return key
                self._changed.wait(pause)
            return None

    def done(self, key: K) -> None:
        """Mark the work on `key` as ended."""
        with self._changed:
            self._busy.discard(key)
            if key in self._waiting:
                self._push(key)
                self._changed.notify()

    def serve(self, work: Callable[[K], object]) -> None:
        """Call `work` for one key after the other until the queue is closed: the body of a thread. Logs exceptions."""
        while (key := self.get()) is not None:
            try:
                work(key)
            except Exception:  # one failure must not end the thread
                logger.exception("unexpected error in the work for %s", key)
            finally:
                self.done(key)

    def close(self) -> None:
        """Make every `get` return None."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._ready)

    def _make_ready(self, key: K) -> None:
        if key not in self._waiting:
            self._waiting.add(key)
            if key not in self._busy:
                self._push(key)

    def _push(self, key: K) -> None:
        self._ready.append(key)

    def _pop(self) -> K | None:
        """The ready key whose turn it is; None when none may start."""
        return self._ready.popleft() if self._ready else None

    def _delay(self, key: K, when: float) -> None:
        if when < self._due.get(key, float("inf")):
            self._due[key] = when
            self._sequence += 1
            heapq.heappush(self._heap, (when, self._sequence, key))

    def _promote(self) -> float | None:
        """Move due keys into the queue; seconds until the next one, or None."""
        while self._heap:
            when, _, key = self._heap[0]
            if self._due.get(key) != when:  # cancelled or replaced
                heapq.heappop(self._heap)
            elif when <= self._clock():
                heapq.heappop(self._heap)
                del self._due[key]
                self._make_ready(key)
            else:
                return min(when - self._clock(), _LONGEST_PAUSE)
        return None

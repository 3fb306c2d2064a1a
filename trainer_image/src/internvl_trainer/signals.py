"""SIGTERM and Ctrl-C: finish the step and save, or exit at once when there is nothing to save."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]
_STOPPING = (signal.SIGTERM, signal.SIGINT)
_END = 0  # the number of no signal
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequested(Exception):
    """Raised in a stage that has nothing to save; starting it again does the work."""


class StopFlag:
    """`requested` is True once a signal has come. Outside of `deferred` a signal calls `leave`, which does not return.

    Leaving at once matters while this process waits for others or loads: nothing would look at the flag for minutes.
    """

    def __init__(self, leave: Callable[[], object]) -> None:
        self.requested = False
        self._leave, self._deferred = leave, False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block, a signal only sets `requested`, because there is state to save."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def notice(self) -> None:
        """A signal has come."""
        self.requested = True
        if not self._deferred:
            self._leave()


@contextmanager
def stop_flag(leave: Callable[[], object]) -> Iterator[StopFlag]:
    """Within the block, SIGTERM and SIGINT are noticed even while the main thread waits inside a library.

    Python runs handlers only between two of its own instructions; the wake-up descriptor is written to at once, and a
    thread reads it.
    """
    flag = StopFlag(leave)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while (number := os.read(reading, 1)[0]) != _END:
            if number in _STOPPING:
                flag.notice()

    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    try:
        with handled(lambda _number, _frame: None):
            yield flag
    finally:
        signal.set_wakeup_fd(previous)
        os.write(writing, bytes([_END]))  # closing is not enough: forked workers have the descriptor too
        thread.join()
        os.close(writing)
        os.close(reading)


@contextmanager
def stop_by_exception() -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT raise StopRequested."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise StopRequested(signal.Signals(number).name)

    with handled(stop):
        yield


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends for any reason.

    An orphan would hold the parent's connections open, and the other ranks would wait for it.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Within the block, this handler gets SIGTERM and SIGINT."""
    previous = {number: signal.signal(number, handler) for number in _STOPPING}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)

"""SIGTERM and Ctrl-C: save the state and exit, or exit at once when there is nothing to save."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]
_STOPPING = (signal.SIGTERM, signal.SIGINT)
_END = 0  # the number of no signal
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_REPEATED_SECONDS = 5.0  # within this time after a signal, another is the same request
_raised_at: list[float] | None = None  # time of the last StopRequested; None outside of stop_by_exception


class StopRequested(Exception):
    """Raised in a stage that has nothing to save; starting it again does the work."""


class StopFlag:
    """`requested` is True once a signal has come. Outside of `deferred` a signal calls `leave`, which does not return.

    Leaving at once matters while this process waits for others or loads: nothing would look at the flag for minutes.
    """

    def __init__(self, leave: Callable[[], object]) -> None:
        self.requested = False
        self._noticed_at: float | None = None
        self._leave, self._deferred = leave, False

    @property
    def seconds(self) -> float:
        """Seconds since the signal; 0 before one has come."""
        return 0.0 if self._noticed_at is None else time.monotonic() - self._noticed_at

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
        self._noticed_at = self._noticed_at or time.monotonic()
        self.requested = True
        if not self._deferred:
            self._leave()


@contextmanager
def stop_flag(leave: Callable[[], object]) -> Iterator[StopFlag]:
    """Within the block, SIGTERM and SIGINT are noticed even while the main thread waits inside a library."""
    flag = StopFlag(leave)
    with noticed(lambda _number: flag.notice()), handled(lambda _number, _frame: None):
        yield flag


@contextmanager
def noticed(notice: Callable[[int], object]) -> Iterator[None]:
    """Within the block, a thread calls `notice` with the number of each SIGTERM and SIGINT, at once.

    Python runs handlers only between two of its own instructions; the wake-up descriptor is written to at once, and a
    thread reads it. This needs a handler in Python for these signals, such as that of `handled`.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while (number := os.read(reading, 1)[0]) != _END:
            if number in _STOPPING:
                notice(number)

    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.write(writing, bytes([_END]))  # closing is not enough: forked workers have the descriptor too
        thread.join()
        os.close(writing)
        os.close(reading)


@contextmanager
def stop_by_exception() -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT raise StopRequested; repeated ones do not disturb the clean-up.

    Slurm signals a worker and also its parent, which forwards it. Nested blocks ignore the same repetitions.
    """
    global _raised_at
    outer, _raised_at = _raised_at, _raised_at or [-math.inf]
    raised_at = _raised_at

    def stop(number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - raised_at[0] > _REPEATED_SECONDS:
            raised_at[0] = now
            raise StopRequested(signal.Signals(number).name)

    try:
        with handled(stop):
            yield
    finally:
        _raised_at = outer


def ignore_stops() -> None:
    """Ignore SIGTERM and SIGINT outside of the blocks above: the worker process has not begun or is about to end."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends for any reason.

    An orphan would hold the parent's connections open, and the other ranks would wait for it.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def only_default_signals() -> None:
    """For a forked process: SIGTERM ends it, and its parent handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Within the block, this handler gets SIGTERM and SIGINT."""
    previous = {number: signal.signal(number, handler) for number in _STOPPING}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)

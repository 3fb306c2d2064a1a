"""SIGTERM and Ctrl-C as a wish to stop that is looked at between steps."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


class StopRequested(Exception):
    """Raised in a stage that has nothing to save; starting it again does the work."""


class StopFlag:
    """True once a signal has come."""

    def __init__(self) -> None:
        self.requested = False

    def set(self, _signal: int, _frame: FrameType | None) -> None:
        """The handler."""
        self.requested = True


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Within: SIGTERM and SIGINT set the flag instead of ending the process."""
    flag = StopFlag()
    with handled(flag.set):
        yield flag


@contextmanager
def stop_by_exception() -> Iterator[None]:
    """Within: SIGTERM and SIGINT raise StopRequested."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise StopRequested(signal.Signals(number).name)

    with handled(stop):
        yield


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Within: this handler for SIGTERM and SIGINT."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)

"""Run a piece of work in a thread beside training, and give its result or error later."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")
Start = Callable[[Callable[[], Result]], "Future[Result]"]
"""Starts a piece of work."""


def in_background(work: Callable[[], Result]) -> Future[Result]:
    """Start `work` in a thread that does not keep the process alive; its future has the result or the error."""
    future: Future[Result] = Future()
    threading.Thread(target=_run, args=(work, future), name="checkpoint", daemon=True).start()
    return future


def _run(work: Callable[[], Result], future: Future[Result]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
        future.set_exception(error)

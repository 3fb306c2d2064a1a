"""Whether work grows in proportion to its input. No clock decides in tests; `make fuzz` compares times too."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_SIZE = 2_000
_FACTOR, _EXTRA = 2.5, 200  # twice the input: at most 2.5 times the work, and what does not depend on the input


def assert_proportional(
    act: Callable[[T], object],
    make: Callable[[int], T],
    *,
    large: int = 2_000_000,
    allowed: tuple[type[Exception], ...] = (),
) -> None:
    """Act on inputs of one and of two sizes, and compare the Python lines that run; then act on a `large` one.

    What a regular expression or another function in C does is not counted: with work that grows by the square, `large`
    takes longer than the time limit of a test. With FUZZ_TIMING set, the times of two large inputs are compared.
    """

    def attempt(value: T) -> None:
        with contextlib.suppress(*allowed):
            act(value)

    once, twice = (_lines(attempt, make(size)) for size in (_SIZE, 2 * _SIZE))
    assert twice <= _FACTOR * once + _EXTRA, f"{once} lines for {_SIZE}, {twice} for {2 * _SIZE}"
    attempt(make(large))
    if os.environ.get("FUZZ_TIMING"):
        _compare_times(attempt, make, large // 2)


def _lines(act: Callable[[T], object], value: T) -> int:
    count = 0

    def trace(*_: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act(value)
    finally:
        sys.settrace(before)
    return count


def _compare_times(act: Callable[[T], object], make: Callable[[int], T], size: int) -> None:
    """The least of several times: other programs can only make one longer."""

    def seconds(count: int) -> float:
        value, times = make(count), []
        for _ in range(5):
            start = time.process_time()
            act(value)
            times.append(time.process_time() - start)
        return min(times)

    once, twice = seconds(size), seconds(2 * size)
    assert twice <= _FACTOR * once + 0.05, f"{once:.3f} s for {size}, {twice:.3f} s for {2 * size}"

"""How idle time is counted from the times of workers and of steps."""

from __future__ import annotations

import pytest
from e2e.holds import Idle, Span, idle


@pytest.mark.parametrize(
    ("held", "trained", "expected"),
    [
        pytest.param([], [], (0.0, 0.0), id="no-worker"),
        pytest.param([(0.0, 30.0), (5.0, 30.0)], [(10.0, 25.0)], (10.0, 25.0), id="start-and-exit"),
        pytest.param([(0.0, 30.0), (0.0, 30.0)], [], (30.0, 60.0), id="no-step"),
        pytest.param([(0.0, 10.0), (20.0, 40.0)], [(30.0, 40.0)], (10.0, 20.0), id="nothing-held-between-attempts"),
        pytest.param([(0.0, 20.0), (20.0, 40.0)], [(5.0, 12.0), (30.0, 40.0)], (18.0, 23.0), id="hold-goes-on"),
        pytest.param([(0.0, 10.0)], [(4.0, 4.0)], (10.0, 10.0), id="one-step-is-no-time"),
    ],
)
def test_idle_time(held: list[Span], trained: list[Span], expected: tuple[float, float]) -> None:
    assert idle(held, trained) == Idle(*expected)

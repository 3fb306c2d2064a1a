"""What a worker that is told to stop has time for."""

from __future__ import annotations

import pytest
from internvl_trainer.train.stop_deadline import has_time_to_save, too_slow_to_stop


@pytest.mark.parametrize(
    ("grace", "elapsed", "store_seconds", "in_flight_seconds", "saves"),
    [
        pytest.param(None, 500, 300, 0, True, id="nobody kills it"),
        pytest.param(120, 5, 20, 10, True, id="both fit"),
        pytest.param(120, 5, 60, 0, False, id="the one in flight has just begun"),
        pytest.param(120, 5, 60, 55, True, id="the one in flight is nearly done"),
        pytest.param(120, 5, 60, 300, True, id="it takes longer than the last one did"),
        pytest.param(120, 60, 60, 60, False, id="the last micro-batch took too long"),
    ],
)
def test_another_checkpoint_is_saved_when_both_fit(
    grace: float | None, elapsed: float, store_seconds: float, in_flight_seconds: float, saves: bool
) -> None:
    found = has_time_to_save(grace, elapsed=elapsed, store_seconds=store_seconds, in_flight_seconds=in_flight_seconds)
    assert found is saves


def test_a_measured_checkpoint_longer_than_the_grace_period_is_a_warning_with_the_sum() -> None:
    assert too_slow_to_stop(None, 20, 500) is None
    assert too_slow_to_stop(120, 20, 90) is None
    assert too_slow_to_stop(120, 20, 283) == (
        "a stop takes 313 s (one micro-batch 20 s + storing a checkpoint 283 s + 10 s), and the worker is killed after "
        "120 s: a stop would lose the steps since the last checkpoint. Raise "
        "podTemplate.terminationGracePeriodSeconds, or lower checkpoint.everySteps"
    )

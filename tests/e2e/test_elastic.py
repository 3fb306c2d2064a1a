"""A run whose number of workers changes while it trains."""

from __future__ import annotations

import pytest
from e2e.harness import CHECKPOINT, Platform, trains
from internvl_api.status import InternVLFineTuneStatus
from ivft_demo.results import losses

pytestmark = pytest.mark.e2e

# Twelve rows a step, so that one, two and three workers can share them.
SETTINGS = {
    "training": {"maxSteps": 200, "epochs": 60, "globalBatchSize": 12, "microBatchSize": 2},
    "checkpoint": CHECKPOINT,
}


def resize(platform: Platform, name: str, workers: int) -> InternVLFineTuneStatus:
    """Change a run's number of workers, and wait until all of them train."""
    platform.change(name, workers=workers)
    return platform.wait(name, f"{workers} train", lambda s: trains(s) and s.workers.active == workers)


def test_losses_stay_the_same_with_two_then_three_then_one_worker(platform: Platform) -> None:
    fixed = platform.apply("quickstart", "fixed-size", **SETTINGS)
    resized = platform.apply("quickstart", "resized", **SETTINGS)
    first = platform.wait("resized", "training", trains)
    second = resize(platform, "resized", 3)
    third = resize(platform, "resized", 1)
    assert first.attempt < second.attempt < third.attempt
    last = platform.follow("resized")
    platform.follow("fixed-size")
    assert (last.restarts.user, last.restarts.infrastructure) == (0, 0), "a change that the user asks for is no failure"
    curve, expected = losses(platform.s3, resized), losses(platform.s3, fixed)
    assert [each.step for each in curve] == [each.step for each in expected]
    assert max(abs(one.loss - other.loss) for one, other in zip(curve, expected, strict=True)) <= 1e-4

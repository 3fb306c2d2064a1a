"""A run whose number of workers changes while it trains: as its user asks, and as room allows."""

from __future__ import annotations

import pytest
from e2e.harness import CHECKPOINT, Platform, trains
from internvl_api.status import InternVLFineTuneStatus
from ivft_demo.data import write_secret
from ivft_demo.results import Loss, losses

pytestmark = pytest.mark.e2e

# Twelve rows a step, so that one, two and three workers can share them.
SETTINGS = {
    "training": {"maxSteps": 200, "epochs": 60, "globalBatchSize": 12, "microBatchSize": 2},
    "checkpoint": CHECKPOINT,
}


QUOTA = "two-pods"


@pytest.fixture(scope="module")
def fixed_size(platform: Platform) -> str:
    """Output of a run that always has the same workers; it may still train."""
    return platform.apply("quickstart", "fixed-size", **SETTINGS)


def curve_of_fixed_size(platform: Platform, output: str) -> list[Loss]:
    platform.follow("fixed-size")
    return losses(platform.s3, output)


def resize(platform: Platform, name: str, workers: int) -> InternVLFineTuneStatus:
    """Change a run's number of workers, and wait until all of them train."""
    platform.change(name, workers=workers)
    return platform.wait(name, f"{workers} train", lambda s: trains(s) and s.workers.active == workers)


def assert_close(curve: list[Loss], expected: list[Loss]) -> None:
    """Sums of other groups of rows differ by rounding."""
    assert [each.step for each in curve] == [each.step for each in expected]
    assert max(abs(one.loss - other.loss) for one, other in zip(curve, expected, strict=True)) <= 1e-4


@pytest.mark.soak  # the next test changes the number of workers too
def test_losses_stay_the_same_with_two_then_three_then_one_worker(platform: Platform, fixed_size: str) -> None:
    resized = platform.apply("quickstart", "resized", **SETTINGS)
    first = platform.wait("resized", "training", trains)
    second = resize(platform, "resized", 3)
    third = resize(platform, "resized", 1)
    assert first.attempt < second.attempt < third.attempt
    last = platform.follow("resized")
    assert (last.restarts.user, last.restarts.infrastructure) == (0, 0), "a change that the user asks for is no failure"
    assert_close(losses(platform.s3, resized), curve_of_fixed_size(platform, fixed_size))


def test_a_run_trains_with_fewer_workers_until_there_is_room_for_all(platform: Platform, fixed_size: str) -> None:
    with platform.cluster.namespace("elastic") as namespace:
        write_secret(platform.cluster, namespace)
        team = Platform(platform.cluster, namespace)
        quota = {"metadata": {"name": QUOTA}, "spec": {"hard": {"pods": "2"}}}
        team.core.create_namespaced_resource_quota(namespace, quota)
        output = team.apply(
            "quickstart", "short-of-room", workers=3, minWorkers=2, runPolicy={"growAfterSeconds": 5}, **SETTINGS
        )
        fewer = team.wait("short-of-room", "training with two", lambda s: trains(s) and s.workers.active == 2)
        assert fewer.elastic is not None
        team.core.patch_namespaced_resource_quota(QUOTA, namespace, {"spec": {"hard": {"pods": "4"}}})
        all_of_them = team.wait("short-of-room", "training with three", lambda s: trains(s) and s.workers.active == 3)
        assert all_of_them.elastic is None
        last = team.follow("short-of-room")
        assert (last.restarts.user, last.restarts.infrastructure) == (0, 0), "room is not the run's fault"
        told = [event.partition(":")[0] for event in team.events("short-of-room")]
        assert {"WorkersReduced", "WorkersGrowing", "WorkersRestored"} <= set(told)
        assert_close(losses(platform.s3, output), curve_of_fixed_size(platform, fixed_size))
        team.delete_all()

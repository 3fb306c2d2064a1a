"""After a GPU ran out of memory: smaller micro batches, the same global batch, and nothing forgotten."""

from typing import Any

import pytest
import yaml
from controller.builders import Raw, a_run, result
from controller.simulator import Operator, World
from internvl_api.spec import RunPolicy
from internvl_api.status import InternVLFineTuneStatus, StageName
from internvl_operator.core.policies import oom_policy
from internvl_operator.core.policies.outcome import Kind, Outcome

FULL = result("train", "failed", "GpuOutOfMemory", message="OutOfMemoryError: CUDA out of memory")


def batches(world: World) -> tuple[int, int, int]:
    """Micro batch, accumulation, global batch of run.yaml as the workers read it."""
    run = yaml.safe_load(world.server.objects["ConfigMap"]["ivft-run"]["data"]["run.yaml"])
    return run["training"]["microBatchSize"], run["gradientAccumulation"], run["training"]["globalBatchSize"]


def training(micro: int, total: int, **policy: Any) -> World:
    world = World(training={"microBatchSize": micro, "globalBatchSize": total}, runPolicy=policy)
    world.reach("train")
    return world


@pytest.mark.parametrize(
    ("micro", "total", "sizes"),
    [
        pytest.param(4, 8, [2, 1, None], id="halves"),
        pytest.param(6, 12, [3, 1, None], id="the-next-that-divides"),
        pytest.param(5, 10, [1, None], id="a-prime"),
        pytest.param(1, 8, [None], id="one-is-the-least"),
    ],
)
def test_the_sizes_that_are_tried(micro: int, total: int, sizes: list[int | None]) -> None:
    run = a_run(training={"microBatchSize": micro, "globalBatchSize": total}).resolved.run_config
    assert run is not None
    status, found = InternVLFineTuneStatus(), []
    while not found or found[-1] is not None:
        found.append(oom_policy.smaller_micro_batch(run, status))
        status.micro_batch_size = found[-1]
    assert found == sizes


def test_it_goes_on_with_half_and_the_same_global_batch_until_one_is_too_much() -> None:
    world = training(4, 16, onOutOfMemory="halveMicroBatch", backoffLimit=0)
    assert batches(world) == (4, 2, 16)
    for attempt, expected in ((2, (2, 4, 16)), (3, (1, 8, 16))):
        world.end("train", 1, FULL)
        world.later(60)
        assert world.server.attempts("train") == {str(attempt)}
        assert batches(world) == expected
        assert world.status["restarts"] == {"user": 0, "infrastructure": 0}
        world.run("train")
    world.end("train", 1, FULL)
    failed = world.server.condition("Failed")
    assert (failed["status"], failed["reason"]) == ("True", "GpuOutOfMemory")
    assert "cannot get smaller" in failed["message"]


def test_a_new_operator_and_a_lost_config_map_keep_the_smaller_batch() -> None:
    world = training(4, 16, onOutOfMemory="halveMicroBatch")
    world.end("train", 1, FULL)
    world.run("train")
    world.server.remove("ConfigMap", "ivft-run")
    world.operator = Operator(world.server)
    world.operator.settle()
    assert batches(world) == (2, 4, 16)


def test_by_default_it_fails_at_once_and_says_what_to_change() -> None:
    world = training(4, 16)
    world.end("train", 1, FULL)
    failed = world.server.condition("Failed")
    assert (failed["status"], failed["reason"]) == ("True", "GpuOutOfMemory")
    assert "lower spec.training.microBatchSize to 2" in failed["message"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(
            {"training": {"microBatchSize": 8, "globalBatchSize": 16}}, (8, 1, 16), id="the-users-word-counts"
        ),
        pytest.param({"podTemplate": {"nodeSelector": {"a": "b"}}}, (2, 4, 16), id="other-pods-are-no-other-run"),
    ],
)
def test_what_a_changed_spec_makes_of_it(change: Raw, expected: tuple[int, int, int]) -> None:
    world = training(4, 16, onOutOfMemory="halveMicroBatch")
    world.end("train", 1, FULL)
    world.run("train")
    world.server.edit_spec(**change)
    world.operator.settle()
    world.collect()
    assert batches(world) == expected


@pytest.mark.parametrize(
    ("stage", "smaller", "wish", "kind", "words"),
    [
        pytest.param("train", 2, "halveMicroBatch", "change", "micro batches of 2", id="goes-on-smaller"),
        pytest.param("train", 2, "fail", "fail", "onOutOfMemory: halveMicroBatch", id="not-asked-for"),
        pytest.param("train", None, "halveMicroBatch", "fail", "maxSeqLength", id="nothing-smaller-than-one"),
        pytest.param("evaluate", 2, "halveMicroBatch", "fail", "evaluation.batchSize", id="not-training"),
        pytest.param("doctor", None, "fail", "retry", "other processes on that GPU", id="the-doctor-needs-little"),
        pytest.param("merge", None, "fail", "fail", "words", id="without-gpus-no-advice"),
    ],
)
def test_a_full_gpu(stage: StageName, smaller: int | None, wish: Any, kind: Kind, words: str) -> None:
    judged = oom_policy.decide(Outcome("change", "Reason", "words"), stage, smaller, RunPolicy(on_out_of_memory=wish))
    assert judged.kind == kind
    assert words in judged.message
    assert ("batchSize" in judged.message) == (stage == "evaluate")

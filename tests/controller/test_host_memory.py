"""A worker that is killed for host memory: its message names the limit, the field and the peak, and its budget ends."""

import pytest
from controller.builders import member
from controller.simulator import World
from internvl_api.status import Progress
from internvl_operator.core.policies.failure_policy import diagnose

LIMIT = {"resources": {"limits": {"memory": "3Gi"}}}


def kill(world: World, rank: int) -> None:
    killed = {"exitCode": 137, "reason": "OOMKilled", "finishedAt": "2026-01-31T11:00:00Z"}
    status = {"containerStatuses": [{"name": "trainer", "state": {"terminated": killed}}]}
    world.server.set_pod(f"run-train-{rank}", {"phase": "Failed", **status})
    world.operator.settle()


@pytest.mark.parametrize(
    ("stage", "limit", "words"),
    [
        pytest.param(
            "train",
            "64Gi",
            "used more memory than its limit of 64Gi: raise spec.podTemplate.resources.limits.memory or lower "
            "spec.training.dataWorkers",
            id="train",
        ),
        pytest.param(
            "merge",
            "512Mi",
            "its limit of 512Mi: raise spec.podTemplate.stageResources.merge.limits.memory",
            id="stage-without-gpus",
        ),
        pytest.param("train", "", "has no memory limit, and its node ran out of memory", id="no-limit"),
    ],
)
def test_the_message_names_the_limit_and_the_field(stage: str, limit: str, words: str) -> None:
    pod = member(stage=stage, phase="Failed", exit_code=137, exit_reason="OOMKilled", memory_limit=limit)
    outcome = diagnose(pod)
    assert outcome is not None
    assert (outcome.kind, outcome.budget, outcome.reason) == ("retry", "user", "OutOfMemory")
    assert words in outcome.message


def test_a_worker_killed_for_its_memory_is_not_started_for_ever() -> None:
    world = World(runPolicy={"backoffLimit": 1}, podTemplate=LIMIT)
    world.reach("train")
    for _ in range(2):
        kill(world, rank=1)
        world.collect()
        world.later(300)
        world.run("train")
    failed = world.server.condition("Failed")
    assert failed["reason"] == "BackoffLimitExceeded"
    assert "used more memory than its limit of 3Gi: raise spec.podTemplate.resources.limits.memory" in failed["message"]


@pytest.mark.parametrize(("rank", "told"), [(0, True), (1, False)])
def test_the_peak_of_the_worker_that_reports_is_told(rank: int, told: bool) -> None:
    world = World(runPolicy={"backoffLimit": 0}, podTemplate=LIMIT)
    world.reach("train")
    report = {"stage": "train", "step": 4, "totalSteps": 9, "peakMemoryBytes": 3_000_000_000}
    world.server.answers["run-train-0"] = Progress.model_validate(report)
    for _ in range(2):
        world.operator.run_pass()
        world.operator.settle()
    kill(world, rank)
    failed = world.server.condition("Failed")
    assert failed["reason"] == "BackoffLimitExceeded"
    assert ("(it last reported a peak of 2.8 GiB)" in failed["message"]) == told

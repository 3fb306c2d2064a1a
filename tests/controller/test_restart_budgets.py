"""Whole runs that go wrong: whose budget it costs, and when it is over."""

import pytest
from controller.builders import Raw, result, terminated
from controller.simulator import World


def checkpoint(step: int) -> Raw:
    return {"step": step, "uri": f"s3://out/{step}", "sha256": "0", "verifiedAt": "2026-01-31T12:00:00Z"}


def lose_a_worker(world: World) -> None:
    world.server.remove("Pod", "run-train-1")
    world.operator.settle()


def train_again(world: World) -> None:
    world.collect()
    world.later(300)
    world.run("train")


def test_a_cluster_that_loses_workers_for_ever_ends_the_run() -> None:
    world = World(runPolicy={"infrastructureLimit": 2, "backoffLimit": 0})
    world.reach("train")
    for _ in range(2):
        lose_a_worker(world)
        train_again(world)
        assert world.status["phase"] == "Running"
    lose_a_worker(world)
    failed = world.server.condition("Failed")
    assert (failed["status"], failed["reason"]) == ("True", "InfrastructureLimitExceeded")
    words = "WorkerLost: worker 1 of 2 disappeared; the 2 restarts of spec.runPolicy.infrastructureLimit"
    assert words in failed["message"]
    assert world.status["restarts"] == {"user": 0, "infrastructure": 2}


def test_why_the_last_attempt_ended_is_kept_while_the_next_one_runs() -> None:
    world = World()
    world.reach("train")
    lose_a_worker(world)
    train_again(world)
    (stage,) = [each for each in world.status["stages"] if each["name"] == "train"]
    assert (stage["state"], stage["reason"]) == ("Running", "WorkerLost")
    assert "worker 1 of 2 disappeared" in stage["message"]
    world.end("train", 0, result("train"))
    (stage,) = [each for each in world.status["stages"] if each["name"] == "train"]
    assert (stage["state"], stage.get("reason"), stage.get("message")) == ("Succeeded", None, None)


def test_a_run_that_gets_further_may_lose_workers_as_often_as_it_likes() -> None:
    world = World(runPolicy={"infrastructureLimit": 1})
    world.reach("train")
    for step in (10, 20, 30):
        saved = result("train", "resume", "Stopped", checkpoint=checkpoint(step))
        world.server.set_pod("run-train-0", {"phase": "Failed", **terminated(75, saved)})
        lose_a_worker(world)
        train_again(world)
        assert world.status["phase"] == "Running"
    assert world.status["restarts"]["infrastructure"] == 3


def test_a_loss_that_is_no_number_ends_the_run_at_once_and_says_where() -> None:
    world = World()
    world.reach("train")
    words = (
        "spec.training: the loss is nan at step 41; the weights were not touched and the checkpoint of step 40 is whole"
    )
    world.end("train", 65, result("train", "failed", "LossNotFinite", message=words))
    failed = world.server.condition("Failed")
    assert (failed["status"], failed["reason"]) == ("True", "LossNotFinite")
    assert words in failed["message"]
    world.later(3600)
    assert world.server.attempts("train") == {"1"}


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        pytest.param("EvictionByEvictionAPI", "Drained", id="drained"),
        pytest.param("PreemptionByScheduler", "Preempted", id="preempted"),
    ],
)
def test_giving_way_costs_nothing_and_what_was_saved_on_the_way_is_known(reason: str, told: str) -> None:
    world = World(runPolicy={"backoffLimit": 0, "infrastructureLimit": 0})
    world.reach("train")
    world.server.drain("run-train-1", reason)
    world.operator.settle()
    assert world.server.condition("Reconciling")["reason"] in (told, "WaitingForOldPods")
    assert f"worker 1 (pod run-train-1) was {told.lower()}" in world.server.condition("Reconciling")["message"]
    assert "deletionTimestamp" in world.server.pods["run-train-0"]["metadata"]  # its peer saves too
    world.end("train", 75, result("train", "resume", "Stopped", checkpoint=checkpoint(7)))
    world.collect()
    world.run("train")
    assert (world.status["phase"], world.status["checkpoint"]["step"]) == ("Running", 7)
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}

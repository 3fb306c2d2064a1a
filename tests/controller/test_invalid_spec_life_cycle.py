"""A spec that becomes invalid while its group trains: the life cycle goes on, and nothing new starts."""

import pytest
from controller.builders import result
from controller.simulator import World

BROKEN = {"training": {"globalBatchSize": 7}}  # not divisible among the workers


def broken_while_training(**policy: object) -> World:
    world = World(training={}, runPolicy=policy)
    world.reach("train")
    world.server.edit_spec(**BROKEN)
    world.operator.settle()
    assert world.status["phase"] == "Stalled"
    return world


def leaving(world: World, stage: str) -> set[bool]:
    return {"deletionTimestamp" in world.server.pods[name]["metadata"] for name in world.pods(stage)}


def test_the_group_trains_on_and_the_message_says_so() -> None:
    world = broken_while_training()
    stalled = world.server.condition("Stalled")
    assert "globalBatchSize" in stalled["message"]
    assert "2 workers that have started run on" in stalled["message"]
    assert leaving(world, "train") == {False}


def test_suspend_frees_the_pods() -> None:
    world = broken_while_training()
    world.server.edit_spec(**BROKEN, runPolicy={"suspend": True})
    world.operator.settle()
    assert leaving(world, "train") == {True}
    assert world.status["phase"] == "Suspended"
    assert "globalBatchSize" in world.server.condition("Suspended")["message"]
    world.collect()
    assert world.pods("train") == []
    world.server.edit_spec(training={}, runPolicy={})
    world.operator.settle()
    assert world.server.attempts("train") == {"2"}
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}


def test_the_deadline_ends_the_run() -> None:
    world = broken_while_training(activeDeadlineSeconds=100)
    world.later(101)
    assert world.server.condition("Failed")["reason"] == "DeadlineExceeded"
    assert leaving(world, "train") == {True}


def test_finished_training_is_recorded_and_published_once_the_spec_is_valid_again() -> None:
    world = broken_while_training()
    world.end("train", 0, result("train"))
    states = {stage["name"]: stage["state"] for stage in world.status["stages"]}
    assert states["train"] == "Succeeded"
    assert world.pods("publish") == []
    world.server.edit_spec(training={})
    world.operator.settle()
    assert world.pods("publish") != []
    assert world.server.attempts("train") == {"1"}


@pytest.mark.parametrize("policy", [{"suspend": "maybe"}, {"backoffLimit": -1, "suspend": True}, "suspend"])
def test_an_invalid_run_policy_is_read_in_part(policy: object) -> None:
    world = broken_while_training()
    world.server.edit_spec(**BROKEN, runPolicy=policy)
    world.operator.settle()
    suspended = isinstance(policy, dict) and policy["suspend"] is True
    assert world.status["phase"] == ("Suspended" if suspended else "Stalled")


def test_a_message_holds_nothing_that_a_terminal_obeys() -> None:
    world = World(**{"\x1b[2Jx\u202e": 1})
    stalled = world.server.condition("Stalled")
    assert stalled["message"] == "spec.x: unknown field"

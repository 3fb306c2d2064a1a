"""Containers that their node restarted in place: without an end of the attempt, the group would wait for ever."""

import pytest
from controller.builders import Raw, result, terminated
from controller.simulator import World


def runs(world: World, *containers: str) -> None:
    """The pods of training run, each in the container given; none: it is being made."""
    for rank, ident in enumerate(containers):
        state: Raw = {"running": {}} if ident else {"waiting": {"reason": "ContainerCreating"}}
        shown = {"name": "trainer", "containerID": ident, "state": state}
        world.server.set_pod(f"run-train-{rank}", {"phase": "Running", "containerStatuses": [shown]})
    world.operator.settle()


def training(**changes: object) -> World:
    world = World(**changes)
    world.pass_stage("preflight")
    return world


@pytest.mark.parametrize(
    ("then", "ended"),
    [
        pytest.param(("containerd://a1", "containerd://b1"), False, id="the same"),
        pytest.param(("containerd://a1", ""), False, id="not told"),
        pytest.param(("containerd://a1", "containerd://b2"), True, id="one is another"),
        pytest.param(("containerd://a2", "containerd://b2"), True, id="all are others"),
    ],
)
def test_a_group_whose_containers_are_others_is_started_again(then: tuple[str, str], ended: bool) -> None:
    world = training()
    runs(world, "containerd://a1", "containerd://b1")
    runs(world, *then)
    assert world.status["attempt"] == (2 if ended else 1)
    assert world.status["restarts"] == {"user": 0, "infrastructure": int(ended)}
    if ended:
        assert world.server.condition("Ready")["reason"] in ("NodeLost", "WaitingForOldPods")
        assert "restarted its container in place" in world.server.condition("Ready")["message"]


def test_the_next_attempt_has_containers_of_its_own() -> None:
    world = training()
    runs(world, "containerd://a1", "containerd://b1")
    runs(world, "containerd://a1", "containerd://b2")
    world.collect()
    runs(world, "containerd://a3", "containerd://b3")
    assert (world.status["attempt"], world.status["phase"]) == (2, "Running")


def test_containers_are_not_compared_before_all_have_run() -> None:
    world = training()
    runs(world, "containerd://a1", "")
    runs(world, "containerd://a2", "containerd://b2")
    assert world.status["attempt"] == 1


def test_a_worker_without_peers_goes_on_by_itself() -> None:
    world = training(workers=1)
    runs(world, "containerd://a1")
    runs(world, "containerd://a2")
    assert world.status["attempt"] == 1


def test_what_its_peers_say_of_it_is_no_better_reason() -> None:
    world = training()
    runs(world, "containerd://a1", "containerd://b1")
    lost = result("train", "failed", "PeerLost", message="another process is gone")
    gone = terminated(1, lost, finished=world.server.now)
    gone["containerStatuses"][0]["containerID"] = "containerd://a1"
    world.server.set_pod("run-train-0", {"phase": "Failed", **gone})
    runs_again = {"name": "trainer", "containerID": "containerd://b2", "state": {"running": {}}}
    world.server.set_pod("run-train-1", {"phase": "Running", "containerStatuses": [runs_again]})
    world.operator.settle()
    assert "restarted its container in place" in world.status["stages"][1]["message"]
    assert world.status["restarts"]["infrastructure"] == 1

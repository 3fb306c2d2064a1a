"""Settings of the operator that change while pods wait to start."""

from typing import Any

import pytest
from controller.builders import Raw, waiting
from controller.fake_server import clock
from controller.simulator import SETTINGS, Operator, World
from internvl_operator.core.resources.pods import DEFAULT_IMAGE

BAD = waiting("ImagePullBackOff", 'Back-off pulling image "localhost/internvl-trainer:dev"')


def restart_operator(world: World, **changes: Any) -> None:
    """An administrator upgrades the release with other values, after the pods had time to start."""
    clock(world.server, 15)
    world.operator = Operator(world.server, SETTINGS.model_copy(update=changes))
    world.operator.settle()


def image(world: World, pod: str) -> str:
    found: str = world.server.pods[pod]["spec"]["containers"][0]["image"]
    return found


def test_a_corrected_default_image_replaces_pods_that_could_not_start() -> None:
    world = World()
    world.server.set_pod("run-preflight-0", {"phase": "Pending", **BAD})
    world.operator.settle()
    stalled = world.server.condition("Stalled")
    assert stalled["reason"] == "ImagePullFailed"
    assert stalled["message"].startswith(DEFAULT_IMAGE)
    restart_operator(world, trainer_image="registry/trainer:good")
    assert image(world, "run-preflight-0") == "registry/trainer:good"
    assert world.server.condition("Stalled")["status"] == "False"
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"image_pull_policy": "Always"}, id="pull-policy"),
        pytest.param({"worker_resources": {"requests": {"cpu": "2"}}}, id="resources"),
        pytest.param({"cache_host_path": "/mnt/cache"}, id="cache"),
    ],
)
def test_a_group_of_which_one_pod_waits_is_made_again_with_other_settings(changes: Raw) -> None:
    world = World()
    world.pass_stage("preflight")
    world.server.set_pod("run-train-0", {"phase": "Running"})
    restart_operator(world, **changes)
    world.collect()
    assert world.server.attempts("train") == {"2"}
    assert len(world.pods("train")) == 2


def test_pods_that_run_keep_their_image() -> None:
    world = World()
    world.reach("train")
    restart_operator(world, trainer_image="registry/trainer:good")
    assert world.server.attempts("train") == {"1"}
    assert image(world, "run-train-0") == "localhost/internvl-trainer:dev"


def test_an_upgrade_and_a_rollback_in_the_middle_of_training_lose_nothing() -> None:
    """Of the operator; the first one's image and settings come back with the rollback."""
    world = World()
    world.reach("train")
    pods, stages = set(world.server.pods), world.status["stages"]
    restart_operator(world, trainer_image="registry/trainer:next", worker_resources={"requests": {"cpu": "2"}})
    restart_operator(world)
    assert (set(world.server.pods), world.status["stages"]) == (pods, stages)
    world.pass_stage("train")
    world.pass_stage("publish")
    assert world.server.condition("Complete")["status"] == "True"
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}


def test_a_run_with_its_own_image_is_left_alone_and_told_its_own_field() -> None:
    world = World(podTemplate={"image": "mine:1"})
    world.server.set_pod("run-preflight-0", {"phase": "Pending", **BAD})
    restart_operator(world, trainer_image="registry/trainer:good")
    assert world.server.attempts("preflight") == {"1"}
    assert world.server.condition("Stalled")["message"].startswith("spec.podTemplate.image: pod run-preflight-0")


def test_an_upgrade_of_the_operator_leaves_pods_without_a_digest_alone() -> None:
    world = World()
    world.server.change(
        "Pod", "run-preflight-0", lambda raw: raw["metadata"]["annotations"].pop("internvl.dev/defaults-digest")
    )
    restart_operator(world, trainer_image="registry/trainer:good")
    assert world.server.attempts("preflight") == {"1"}


def test_an_image_without_a_trainer_names_where_it_is_set() -> None:
    world = World()
    state = {"exitCode": 128, "reason": "StartError", "message": "exec: internvl-trainer: not found"}
    status = {"containerStatuses": [{"name": "trainer", "state": {"terminated": state}}]}
    world.server.set_pod("run-preflight-0", {"phase": "Failed", **status})
    world.operator.settle()
    stalled = world.server.condition("Stalled")
    assert stalled["reason"] == "ContainerNotStarted"
    assert stalled["message"].startswith(DEFAULT_IMAGE)

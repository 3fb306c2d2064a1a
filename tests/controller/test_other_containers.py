"""Containers that an admission webhook adds to the pods: init containers that fail or hang, images nobody can pull."""

from typing import Any

import pytest
from controller.builders import Raw, raw_pod, result, text, waiting
from controller.simulator import World
from internvl_operator.core.observe import read_pod

FAILED = {"name": "vault-agent-init", "state": {"terminated": {"exitCode": 1, "reason": "Error", "message": "sealed"}}}
HANGING = {"name": "vault-agent-init", "state": {"running": {"startedAt": "2026-01-31T12:00:00Z"}}}
NO_IMAGE = {"name": "proxy", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
READY: list[Raw] = [{"type": "PodReadyToStartContainers", "status": "True"}]


def starting(world: World, **status: Any) -> None:
    """The workers have a node and a network; the trainer waits unless `status` says otherwise."""
    told = {"phase": "Pending", "startTime": text(world.server.now), "conditions": READY, **waiting("PodInitializing")}
    for name in world.pods("train"):
        world.server.change("Pod", name, lambda raw: raw["spec"].update(nodeName="node-1"))
        world.server.set_pod(name, told | status)
    world.operator.settle()


@pytest.fixture
def world() -> World:
    made = World(runPolicy={"startDeadlineSeconds": 300})
    made.pass_stage("preflight")
    return made


def train(world: World) -> Raw:
    found: Raw = next(stage for stage in world.status["stages"] if stage["name"] == "train")
    return found


def test_an_init_container_that_fails_is_named_and_is_no_failure_of_the_node(world: World) -> None:
    starting(world, phase="Failed", initContainerStatuses=[FAILED])
    assert train(world)["reason"] == "OtherContainerFailed"
    assert train(world)["message"] == (
        "worker 0 (pod run-train-0) never started: its init container 'vault-agent-init' ended with exit code 1 "
        "(Error: sealed)"
    )
    assert world.status["restarts"] == {"user": 0, "infrastructure": 1}
    assert world.status["nodeFailures"] == {}


def test_an_init_container_that_hangs_is_named_and_not_the_image(world: World) -> None:
    starting(world, initContainerStatuses=[HANGING])
    world.later(31)
    told = world.server.condition("Reconciling")
    assert told["reason"] == "OtherContainerBlocked"
    assert "has been waiting for its init container 'vault-agent-init' since" in told["message"]
    world.later(300)
    assert train(world)["reason"] == "StartDeadlineExceeded"
    assert "its init container 'vault-agent-init' has not ended" in train(world)["message"]
    assert "image" not in train(world)["message"]


@pytest.mark.parametrize("part", ["initContainerStatuses", "containerStatuses"])
def test_an_image_of_another_container_that_cannot_be_pulled_waits_for_the_user(world: World, part: str) -> None:
    trainer = waiting("PodInitializing")["containerStatuses"]
    starting(
        world, **{"containerStatuses": trainer, part: [*(trainer if part == "containerStatuses" else ()), NO_IMAGE]}
    )
    told = world.server.condition("Stalled")
    assert told["reason"] == "OtherContainerBlocked"
    assert "cannot get the image of its" in told["message"]
    assert "no such image" in told["message"]


def test_a_trainer_that_runs_trains_on_beside_a_container_without_an_image(world: World) -> None:
    """Kubernetes calls the pod Pending until each of its containers has started."""
    running = {"name": "trainer", "containerID": "containerd://one", "state": {"running": {}}}
    starting(world, containerStatuses=[running, NO_IMAGE])
    assert world.status["phase"] == "Running"
    world.later(600)
    assert world.status["attempt"] == 1
    world.end("train", 0, result("train"))
    assert world.status["stage"] == "publish"


def test_what_a_pod_says_of_other_containers_is_bounded() -> None:
    many = [{"name": f"c{number}" * 300, "state": {"waiting": {"reason": "x" * 9999}}} for number in range(100)]
    pod = read_pod(raw_pod(status={"phase": "Pending", "initContainerStatuses": many, "containerStatuses": [{}]}))
    assert pod is not None
    assert len(pod.others) == 8
    assert max(len(each.name) for each in pod.others) <= 253


@pytest.mark.parametrize(("started", "waits_for"), [(False, "daemon"), (True, "image")])
def test_a_sidecar_of_a_network_profile_holds_the_trainer_only_until_it_has_started(
    world: World, started: bool, waits_for: str
) -> None:
    sidecar = {"name": "daemon", "started": started, "state": {"running": {}}}
    for name in world.pods("train"):
        declared = [{"name": "daemon", "image": "daemon:1", "restartPolicy": "Always"}]
        world.server.change("Pod", name, lambda raw, own=declared: raw["spec"].update(initContainers=own))
    starting(world, initContainerStatuses=[sidecar])
    world.later(31)
    message = world.server.condition("Reconciling")["message"]
    assert ("init container 'daemon'" in message) == (waits_for == "daemon")
    assert ("pulling its image" in message) == (waits_for == "image")
    assert "admission webhook or a network profile" in message or started

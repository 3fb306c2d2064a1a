"""Pods with a container beside the trainer, which an admission webhook injected and which does not end by itself."""

import pytest
from controller.builders import result, terminated
from controller.simulator import STAGES, World


def end_beside_a_sidecar(world: World, stage: str) -> None:
    """The trainer exits; the pod's phase stays Running, as the kubelet reports it."""
    world.run(stage)
    ended = terminated(0, result(stage), finished=world.server.now)
    sidecar = {"name": "proxy", "state": {"running": {}}}
    for name in world.pods(stage):
        statuses = [*ended["containerStatuses"], sidecar]
        world.server.set_pod(name, {"phase": "Running", "containerStatuses": statuses})
    world.operator.settle()


def deleted(world: World, stage: str) -> set[bool]:
    return {"deletionTimestamp" in world.server.pods[name]["metadata"] for name in world.pods(stage)}


def test_pods_of_an_ended_stage_do_not_keep_their_gpus_for_a_sidecar() -> None:
    world = World()
    for stage in ("preflight", "train"):
        end_beside_a_sidecar(world, stage)
    assert world.status["stage"] == "publish"
    assert deleted(world, "train") == {False}  # a native sidecar ends within the grace period, and the logs stay
    world.later(29)
    assert deleted(world, "train") == {False}
    world.later(1)
    assert deleted(world, "train") == {True}


@pytest.mark.parametrize(("policy", "gone"), [("Running", True), ("All", True), ("None", False)])
def test_a_finished_run_leaves_no_pod_running_for_a_sidecar(policy: str, gone: bool) -> None:
    world = World(runPolicy={"cleanPodPolicy": policy})
    for stage in STAGES:
        end_beside_a_sidecar(world, stage)
    assert world.status["phase"] == "Succeeded"
    world.later(31)
    assert deleted(world, "publish") == {gone}


def test_a_pod_that_ended_whole_keeps_its_logs() -> None:
    world = World()
    for stage in STAGES:
        world.pass_stage(stage)
    world.later(1000)
    assert {flag for stage in STAGES for flag in deleted(world, stage)} == {False}


def test_a_retried_group_is_replaced_although_its_sidecars_run() -> None:
    world = World(runPolicy={"backoffLimit": 3})
    world.reach("train")
    ended = terminated(1, "boom", finished=world.server.now)
    for name in world.pods("train"):
        statuses = [*ended["containerStatuses"], {"name": "proxy", "state": {"running": {}}}]
        world.server.set_pod(name, {"phase": "Running", "containerStatuses": statuses})
    world.operator.settle()
    assert deleted(world, "train") == {True}
    world.collect()
    world.later(60)
    assert world.server.attempts("train") == {"2"}

"""Groups that cannot begin: their nodes are freed in time, and the pod and the cause are named."""

from typing import Any

import pytest
from controller.builders import Raw, text, waiting
from controller.fake_server import clock
from controller.simulator import Operator, World
from internvl_api.constants import KIND

NO_GPU = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
GATED = "Scheduling is blocked due to non-empty scheduling gates"


def unscheduled(reason: str = "Unschedulable", message: str = NO_GPU) -> Raw:
    condition = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
    return {"phase": "Pending", "conditions": [condition]}


def place(world: World, pod: str, status: Raw) -> None:
    world.server.change("Pod", pod, lambda raw: raw["spec"].update(nodeName="gpu-1"))
    world.server.set_pod(pod, {"conditions": [], **status})
    world.operator.settle()


def half_scheduled(**policy: Any) -> World:
    """Worker 0 has a node, worker 1 finds none."""
    world = World(runPolicy=policy)
    world.pass_stage("preflight")
    place(world, "run-train-0", {"phase": "Running"})
    world.server.set_pod("run-train-1", unscheduled())
    world.operator.settle()
    return world


def test_a_group_that_finds_no_room_frees_what_it_has_and_tries_again_later() -> None:
    world = half_scheduled(schedulingDeadlineSeconds=60)
    assert world.server.condition("Reconciling")["reason"] == "Unschedulable"
    world.later(59)
    assert world.status["attempt"] == 1
    world.later(1)
    stalled = world.server.condition("Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "SchedulingDeadlineExceeded")
    assert (
        f"pod run-train-1 found no node within 60 s (spec.runPolicy.schedulingDeadlineSeconds): {NO_GPU}; "
        in (stalled["message"])
    )
    assert "releasing the 1 of 2 workers that were scheduled" in stalled["message"]
    world.collect()
    assert world.pods("train") == []
    world.later(10)
    assert world.server.attempts("train") == {"2"}
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}


@pytest.mark.parametrize("seconds", [10**12, 2**63 - 1])
@pytest.mark.parametrize(
    "field",
    [
        "activeDeadlineSeconds", "schedulingDeadlineSeconds", "startDeadlineSeconds", "progressDeadlineSeconds",
        "ttlSecondsAfterFinished",
    ],
)  # fmt: skip
def test_a_deadline_beyond_the_calendar_never_comes(field: str, seconds: int) -> None:
    world = half_scheduled(**{field: seconds})
    world.later(10**6)
    assert world.status["phase"] == "Pending"
    world.server.change(KIND, "run", lambda raw: raw["spec"]["runPolicy"].update(suspend=True))
    world.operator.settle()
    assert world.status["phase"] == "Suspended"


def test_the_scheduling_deadline_outlives_the_operator_and_ends_with_the_last_pod_scheduled() -> None:
    world = half_scheduled(schedulingDeadlineSeconds=60)
    clock(world.server, 30)
    world.operator = Operator(world.server)
    world.operator.settle()
    assert world.operator.requeue == 30
    place(world, "run-train-1", {"phase": "Running"})
    world.later(3600)
    assert (world.status["phase"], world.status["attempt"]) == ("Running", 1)
    assert "unscheduledSince" not in world.status


def test_a_pod_that_waits_in_a_queue_may_wait() -> None:
    world = World(runPolicy={"schedulingDeadlineSeconds": 60})
    world.server.set_pod("run-preflight-0", unscheduled("SchedulingGated", GATED))
    world.operator.settle()
    assert world.server.condition("Reconciling")["reason"] == "SchedulingGated"
    world.later(86_400)
    assert world.status["attempt"] == 1
    world.server.set_pod("run-preflight-0", unscheduled())  # admitted: from now on it counts
    world.operator.settle()
    assert world.operator.requeue == 60


def test_without_a_deadline_a_group_waits_for_room_and_nothing_is_written() -> None:
    world = half_scheduled()
    before = len(world.server.writes)
    world.later(86_400)
    assert world.server.writes[before:] == []


def test_an_image_that_does_not_come_frees_the_group_and_is_named() -> None:
    world = World(runPolicy={"startDeadlineSeconds": 300})
    world.pass_stage("preflight")
    place(world, "run-train-0", {"phase": "Running"})
    pull = waiting("ImagePullBackOff", 'Back-off pulling image "registry/none:1"')
    place(world, "run-train-1", {"phase": "Pending", "startTime": text(world.server.now), **pull})
    assert world.server.condition("Stalled")["reason"] == "ImagePullFailed"
    world.later(299)
    assert world.status["attempt"] == 1
    world.later(1)
    stalled = world.server.condition("Stalled")
    assert stalled["reason"] == "StartDeadlineExceeded"
    assert "pod run-train-1 on node gpu-1 did not start within 300 s" in stalled["message"]
    assert 'Back-off pulling image "registry/none:1"' in stalled["message"]
    world.collect()
    assert world.pods("train") == []


def test_a_run_past_its_deadline_tells_what_held_it_up() -> None:
    world = half_scheduled(activeDeadlineSeconds=100)
    world.later(100)
    failed = world.server.condition("Failed")
    assert failed["reason"] == "DeadlineExceeded"
    assert failed["message"].endswith(f"(at the end pod run-train-1 finds no node: {NO_GPU})")


def preflight_of_three(**changes: Any) -> World:
    """Two pods of preflight run, the third finds no node."""
    rows = {"train": {"photos": {"annotation": "s3://data/train.jsonl"}}, "preflight": {"workers": 3}}
    world = World(data=rows, **changes)
    for rank in range(2):
        place(world, f"run-preflight-{rank}", {"phase": "Running"})
    world.server.set_pod("run-preflight-2", unscheduled())
    world.operator.settle()
    return world


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="no-deadline"),
        pytest.param({"runPolicy": {"schedulingDeadlineSeconds": 60}}, id="deadline"),
        pytest.param({"minWorkers": 1}, id="elastic"),
    ],
)
def test_a_pod_of_preflight_without_a_node_neither_ends_the_attempt_nor_keeps_the_stage(changes: Raw) -> None:
    """The first pod checks what it leaves, so ending the others' work would help nobody."""
    world = preflight_of_three(**changes)
    world.later(3600)
    assert (world.status["attempt"], world.status["phase"]) == (1, "Pending")
    world.end("preflight", ranks=(0,))
    assert world.status["stage"] == "train"
    world.collect()
    assert world.pods("preflight") == ["run-preflight-0"], "one had no node, one had nothing left to do"
    world.run("train")
    assert world.status["phase"] == "Running"
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}


def test_the_first_pod_of_preflight_has_the_deadline_of_every_worker() -> None:
    world = preflight_of_three(runPolicy={"schedulingDeadlineSeconds": 60})
    world.server.change("Pod", "run-preflight-0", lambda raw: raw["spec"].pop("nodeName"))
    world.server.set_pod("run-preflight-0", unscheduled())
    world.operator.settle()
    world.later(60)
    assert world.server.condition("Stalled")["reason"] == "SchedulingDeadlineExceeded"


def test_a_pod_of_preflight_that_fails_after_the_first_has_succeeded_costs_nothing() -> None:
    world = preflight_of_three()
    world.end("preflight", ranks=(0,))
    world.end("preflight", 1, "boom", ranks=(1,))
    assert world.status["stage"] == "train"
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}

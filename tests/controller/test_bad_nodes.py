"""A node that failed twice under a run is avoided, as long as others have room."""

from typing import Any

import pytest
from controller.builders import Raw, a_run, member, result
from controller.simulator import World
from internvl_api.status import InternVLFineTuneStatus, StageResult
from internvl_operator.core.policies import bad_nodes
from internvl_operator.core.resources import node_affinity
from internvl_operator.metrics import RunCollector

REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
EXCLUDED = {"key": "metadata.name", "operator": "NotIn", "values": ["bad"]}


def lose(world: World, node: str = "bad", reason: str = "NodeLost") -> None:
    """Worker 1 runs on the node, which fails; the next attempt starts."""
    world.run("train")
    world.server.change("Pod", "run-train-1", lambda raw: raw["spec"].update(nodeName=node))
    world.server.set_pod("run-train-1", {"phase": "Failed", "reason": reason, "containerStatuses": []})
    world.operator.settle()
    world.collect()
    if "retryAt" in world.status:
        world.later(400)  # the pause before the next attempt


def terms(world: World) -> Any:
    affinity = world.server.pods["run-train-0"]["spec"].get("affinity") or {}
    return affinity.get("nodeAffinity", {}).get(REQUIRED, {}).get("nodeSelectorTerms")


def unschedulable(world: World) -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"}
    for name in world.pods("train"):
        world.server.set_pod(name, {"phase": "Pending", "conditions": [condition]})
    world.operator.settle()


def test_a_node_that_failed_twice_is_avoided_and_named() -> None:
    world = World()
    world.pass_stage("preflight")
    lose(world)
    assert terms(world) is None
    assert world.status["nodeFailures"] == {"bad": 1}
    lose(world)
    assert terms(world) == [{"matchFields": [EXCLUDED]}]
    assert world.status["nodeFailures"] == {"bad": 2}
    told = [message for _, reason, message in world.server.events if reason == "NodeAvoided"]
    assert told == [f"node bad {bad_nodes.AVOIDED}; its next attempts avoid it"]


def test_nodes_that_fail_once_each_are_not_avoided() -> None:
    world = World()
    world.pass_stage("preflight")
    for node in ("one", "two", "three"):
        lose(world, node)
    assert terms(world) is None


@pytest.mark.parametrize("reason", ["Evicted", "NodeShutdown", "Preempting"])
def test_orderly_ends_are_no_failures_of_the_node(reason: str) -> None:
    world = World()
    world.pass_stage("preflight")
    for _ in range(3):
        lose(world, reason=reason)
    assert world.status["nodeFailures"] == {}


def test_a_container_restarted_in_place_counts_against_its_node() -> None:
    pod = member(1, node="bad")
    assert bad_nodes.counted(InternVLFineTuneStatus(), [member(0, node="good"), pod], pod) == {"bad": 1}


@pytest.mark.parametrize(
    ("reason", "weight"),
    [
        pytest.param("GpuHardwareError", 2, id="broken: avoided at once"),
        pytest.param("GpuFault", 1, id="suspect"),
        pytest.param("GpuUnavailable", 1, id="no GPU that works"),
        pytest.param("RdmaRegistrationFailed", 1, id="no locked memory"),
        pytest.param("NodeUnfit", 1, id="a failed check of the stage doctor"),
        pytest.param("PeerLost", 0, id="another node may be the cause"),
        pytest.param("NetworkFault", 0, id="the network between them"),
        pytest.param("GpuOutOfMemory", 0, id="the micro batch"),
        pytest.param("DeviceAssertFailed", 0, id="the data"),
        pytest.param("OutOfMemory", 0, id="the settings"),
    ],
)
def test_how_much_the_last_word_of_a_worker_counts_against_its_node(reason: str, weight: int) -> None:
    said = StageResult.model_validate(result("train", "failed", reason))
    failed = member(1, node="bad", phase="Failed", exit_code=1, result=said)
    peer = member(0, node="good", phase="Failed", exit_code=1)
    counted = bad_nodes.counted(InternVLFineTuneStatus(), [peer, failed, failed], None)
    assert counted == ({"bad": weight} if weight else {})
    avoided = bad_nodes.avoided(InternVLFineTuneStatus(node_failures=counted))
    assert avoided == (["bad"] if weight > 1 else [])


def test_a_node_with_a_broken_gpu_is_avoided_by_the_next_attempt() -> None:
    world = World()
    world.pass_stage("preflight")
    world.run("train")
    world.server.change("Pod", "run-train-1", lambda raw: raw["spec"].update(nodeName="bad"))
    world.end("train", 1, result("train", "failed", "GpuHardwareError", message="rank 1: ECC"), ranks=(1,))
    world.collect()
    assert terms(world) == [{"matchFields": [EXCLUDED]}]
    assert world.status["restarts"] == {"user": 0, "infrastructure": 1}


def test_avoided_nodes_are_allowed_again_when_nothing_else_has_room() -> None:
    world = World()
    world.pass_stage("preflight")
    lose(world)
    lose(world)
    unschedulable(world)
    world.later(59)
    assert terms(world) is not None
    world.later(1)
    world.collect()
    assert terms(world) is None, "the pods have waited long enough: they start without a pause"
    assert world.pods("train") == ["run-train-0", "run-train-1"]
    assert world.status["nodeFailures"] == {"bad": 1}
    assert world.status["restarts"] == {"user": 0, "infrastructure": 2}
    stage = next(stage for stage in world.status["stages"] if stage["name"] == "train")
    assert stage["reason"] == "AvoidedNodesAllowed"
    lose(world)
    assert terms(world) == [{"matchFields": [EXCLUDED]}]


def test_a_shorter_scheduling_deadline_allows_them_sooner() -> None:
    world = World(runPolicy={"schedulingDeadlineSeconds": 20})
    world.pass_stage("preflight")
    lose(world)
    lose(world)
    unschedulable(world)
    world.later(20)
    stage = next(stage for stage in world.status["stages"] if stage["name"] == "train")
    assert stage["reason"] == "AvoidedNodesAllowed"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(None, [{"matchFields": [EXCLUDED]}], id="none"),
        pytest.param(
            {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": []}}}, [{"matchFields": [EXCLUDED]}], id="empty"
        ),
        pytest.param(
            {
                "podAntiAffinity": {"x": 1},
                "nodeAffinity": {
                    "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1}],
                    REQUIRED: {
                        "nodeSelectorTerms": [{"matchExpressions": [{"key": "a"}]}, {"matchFields": [{"k": 1}]}]
                    },
                },
            },
            [
                {"matchExpressions": [{"key": "a"}], "matchFields": [EXCLUDED]},
                {"matchFields": [{"k": 1}, EXCLUDED]},
            ],
            id="alternatives",
        ),
    ],
)
def test_the_users_affinity_stays(given: Raw | None, expected: list[Raw]) -> None:
    found = node_affinity.without(given, ["bad"])
    assert found is not None
    assert found["nodeAffinity"][REQUIRED]["nodeSelectorTerms"] == expected
    for kind, rules in (given or {}).items():
        assert found[kind] == rules or kind == "nodeAffinity"
    assert node_affinity.without(given, []) is given


def test_what_status_remembers_is_bounded() -> None:
    status = InternVLFineTuneStatus()
    for number in range(200):
        lost = member(node=f"n{number}", phase="Failed", pod_reason="NodeLost", of=a_run())
        status.node_failures = bad_nodes.counted(status, [lost], None)
    assert len(status.node_failures) == 64


def test_the_metric_has_one_series_a_run() -> None:
    status = InternVLFineTuneStatus(phase="Running", node_failures={"a": 2, "b": 3, "c": 1})
    families = RunCollector(lambda: [("team", "run", status)]).collect()
    found = [sample for family in families for sample in family.samples if sample.name == "internvl_job_avoided_nodes"]
    assert [(sample.labels, sample.value) for sample in found] == [({"job_namespace": "team", "job_name": "run"}, 2)]

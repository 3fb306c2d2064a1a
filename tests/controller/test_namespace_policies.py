"""A namespace's ResourceQuota and LimitRange: what a run needs to get past them, and what it is told."""

from typing import Any

import pytest
from controller.builders import CONFIG, Raw, a_run, custom_resource
from controller.fake_server import Server
from controller.simulator import Operator
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.policies.refused_child import refusal_reason
from internvl_operator.core.resources import pods
from internvl_operator.core.stages import Stage
from internvl_operator.kube.client import ApiError

LIMITS = {"cpu": "8", "memory": "64Gi", "rdma/hca": 1}


def resources(stage: Any, config: OperatorConfig = CONFIG, **template: Any) -> Raw:
    run = a_run(workers=1, gpusPerWorker=1, podTemplate=template)
    (container,) = pods.build(run, Stage(stage), 1, 0, config)["spec"]["containers"]
    found: Raw = container["resources"]
    return found


def quota_on_limits(server: Server) -> None:
    """A ResourceQuota on limits.memory: every pod has to state that limit."""

    def refuse(obj: Raw) -> ApiError | None:
        if obj["kind"] != "Pod" or "memory" in obj["spec"]["containers"][0]["resources"].get("limits", {}):
            return None
        name = obj["metadata"]["name"]
        text = f'pods "{name}" is forbidden: failed quota: team-limits: must specify limits.memory for: trainer'
        return ApiError(403, "Forbidden", text)

    server.refuse = refuse


@pytest.mark.parametrize("stage", ["preflight", "merge", "publish"])
def test_a_stage_without_gpus_gets_the_workers_compute_limits(stage: str) -> None:
    assert resources(stage, resources={"limits": LIMITS, "requests": {"cpu": 4}}) == {
        "requests": CONFIG.stage_resources["requests"],
        "limits": {"cpu": "8", "memory": "64Gi"},
    }


@pytest.mark.parametrize(
    ("workers", "config", "limits"),
    [
        pytest.param({"cpu": "50m", "memory": "150Mi"}, {}, {"cpu": "1", "memory": "4Gi"}, id="a-small-worker"),
        pytest.param({"memory": 5_000_000_000}, {}, {"memory": 5_000_000_000}, id="in-bytes"),
        pytest.param({"memory": "5Gi"}, {"requests": {"memory": "8Gi"}}, {"memory": "8Gi"}, id="a-larger-request"),
        pytest.param({"ephemeral-storage": "1Gi"}, {}, None, id="no-limit-of-disk"),
    ],
)
def test_a_derived_limit_leaves_room_for_the_stage(workers: Raw, config: Raw, limits: Raw | None) -> None:
    operator = OperatorConfig(stage_resources=config) if config else CONFIG
    found = resources("preflight", operator, resources={"limits": workers})
    assert found.get("limits") == limits
    assert found["requests"] == operator.stage_resources["requests"]


def test_the_administrators_limits_stay() -> None:
    config = OperatorConfig(stage_resources={"limits": {"memory": "2Gi"}})
    assert resources("preflight", config, resources={"limits": LIMITS})["limits"] == {"cpu": "8", "memory": "2Gi"}


@pytest.mark.parametrize(
    ("stage", "field"),
    [
        ("preflight", "preflight"),
        ("merge", "merge"),
        ("publish", "publish"),
        ("evaluate", "evaluate"),
        ("baseline-evaluate", "evaluate"),
    ],
)
def test_resources_of_one_stage(stage: str, field: str) -> None:
    given = {"limits": {"memory": "3Gi"}}
    found = resources(stage, stageResources={field: given}, resources={"limits": LIMITS})
    gpus = {"nvidia.com/gpu": "1"} if field == "evaluate" else {}
    assert found == {"limits": {"memory": "3Gi", **gpus}}
    assert resources("train", stageResources={field: given}) == resources("train")


def test_a_run_with_a_stages_limits_gets_past_a_quota_that_asks_for_them() -> None:
    server = Server()
    quota_on_limits(server)
    server.create(custom_resource())
    operator = Operator(server)
    for _ in range(3):
        operator.hear()
        operator.run_pass()
    stalled = server.condition("Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "ResourcesMissing")
    for words in ("ResourceQuota 'team-limits'", "limits.memory", "spec.podTemplate.stageResources.preflight"):
        assert words in stalled["message"]
    server.edit_spec(podTemplate={"stageResources": {"preflight": {"limits": {"memory": "1Gi"}}}})
    operator.settle()
    assert list(server.pods) == ["run-preflight-0"]
    assert server.condition("Stalled")["status"] == "False"


@pytest.mark.parametrize(
    ("stage", "message", "reason", "words"),
    [
        pytest.param(
            "train",
            "exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, used: requests.nvidia.com/gpu=4, limited: …",
            "QuotaExceeded",
            ("ResourceQuota 'gpus' of namespace 'team'", "spec.gpusPerWorker"),
            id="gpus",
        ),
        pytest.param(
            "train",
            "exceeded quota: few, requested: pods=1, used: pods=1, limited: pods=1",
            "QuotaExceeded",
            ("ResourceQuota 'few'", "lower spec.workers"),
            id="number-of-pods",
        ),
        pytest.param(
            "preflight",
            "exceeded quota: few, requested: pods=1, used: pods=3, limited: pods=3",
            "QuotaExceeded",
            ("lower spec.data.preflight.workers",),
            id="number-of-preflights-pods",
        ),
        pytest.param(
            "preflight",
            "exceeded quota: cpu, requested: requests.cpu=16, used: requests.cpu=40, limited: requests.cpu=48",
            "QuotaExceeded",
            ("lower spec.data.preflight.workers or spec.podTemplate.stageResources.preflight",),
            id="processors-of-preflight",
        ),
        pytest.param(
            "merge",
            "exceeded quota: mem, requested: limits.memory=64Gi,pods=1, used: limits.memory=10Gi,pods=1, limited: …",
            "QuotaExceeded",
            ("lower spec.podTemplate.stageResources.merge",),
            id="memory-of-merge",
        ),
        pytest.param(
            "train",
            "failed quota: team: must specify limits.cpu for: trainer; limits.memory for: trainer",
            "ResourcesMissing",
            ("limits.cpu, limits.memory", "set spec.podTemplate.resources"),
            id="a-worker-without-limits",
        ),
        pytest.param(
            "publish",
            "failed quota: team: must specify limits.memory,requests.ephemeral-storage",
            "ResourcesMissing",
            ("limits.memory, requests.ephemeral-storage",),
            id="an-older-servers-words",
        ),
        pytest.param(
            "preflight",
            'spec.containers[0].resources.requests: Invalid value: "512Mi": must be less than or equal to memory limit '
            "of 256Mi",
            "LimitRangeViolated",
            ("a LimitRange of namespace 'team'", "spec.podTemplate.stageResources.preflight"),
            id="a-default-limit-below-the-request",
        ),
        pytest.param(
            "baseline-evaluate",
            'pods "x" is forbidden: minimum memory usage per Container is 8Gi, but request is 2Gi',
            "LimitRangeViolated",
            ("spec.podTemplate.stageResources.evaluate",),
            id="a-minimum",
        ),
        pytest.param(
            "train",
            'pods "x" is forbidden: cpu max limit to request ratio per Container is 2, but provided ratio is 8.0',
            "LimitRangeViolated",
            ("spec.podTemplate.resources",),
            id="a-ratio",
        ),
        pytest.param(None, "services is forbidden", "ForbiddenChild", ("services is forbidden",), id="another-child"),
        pytest.param(
            None, "exceeded quota: few, requested: services=1, used: …", "QuotaExceeded", ("'few'",), id="a-service"
        ),
    ],
)
def test_what_a_refused_child_is_told(stage: str | None, message: str, reason: str, words: tuple[str, ...]) -> None:
    found, text = refusal_reason("Pod x", stage, "team", 403, "Forbidden", message)
    assert found == reason
    assert message in text
    assert [word for word in words if word not in text] == []

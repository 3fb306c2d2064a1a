"""Runs that meet their namespace on two real nodes: a quota, each other's names, injected sidecars, invalid edits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from e2e.harness import CHECKPOINT, NAMESPACE, STEPS, Platform, stalled, trains
from internvl_api.constants import LABEL_JOB
from ivft_cluster.images import pause_image
from ivft_cluster.shell import wait_for
from ivft_demo.results import losses
from kubernetes import client

pytestmark = pytest.mark.e2e

HALF = "half-a-group"  # a ResourceQuota for one pod, and the PriorityClass of the pods that it counts
SIDECAR = "inject-a-sidecar"
ADMISSION = "admissionregistration.k8s.io"
SHORT = {"maxSteps": 4, "epochs": 2}
TASK = {
    "task": "caption",
    "annotation": "s3://demo/data/train.jsonl",
    "root": "s3://demo/data/",
    "maxNewTokens": 4,
    "limit": 4,
}


@pytest.fixture(scope="module")
def quota(platform: Platform) -> Iterator[None]:
    """A quota that admits one pod of its class at a time."""
    scheduling: Any = client.SchedulingV1Api(platform.api)
    scheduling.create_priority_class({"metadata": {"name": HALF}, "value": 0})
    scope = {"scopeName": "PriorityClass", "operator": "In", "values": [HALF]}
    spec = {"hard": {"pods": "1"}, "scopeSelector": {"matchExpressions": [scope]}}
    platform.core.create_namespaced_resource_quota(NAMESPACE, {"metadata": {"name": HALF}, "spec": spec})
    yield
    platform.core.delete_namespaced_resource_quota(HALF, NAMESPACE)
    scheduling.delete_priority_class(HALF)


@pytest.fixture(scope="module")
def injection(platform: Platform) -> Iterator[bool]:
    """Whether the API server adds a container to every pod of the run `sidecar`, as a service mesh does."""
    expression = (
        "Object{spec: Object.spec{containers: [Object.spec.containers{name: 'proxy', "
        f"image: '{pause_image().name}', imagePullPolicy: 'IfNotPresent'}}]}}}}"
    )
    policy = {
        "matchConstraints": {
            "resourceRules": [
                {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
            ]
        },
        "matchConditions": [
            {"name": "the-run", "expression": f"object.metadata.?labels['{LABEL_JOB}'].orValue('') == 'sidecar'"}
        ],
        "failurePolicy": "Ignore",
        "reinvocationPolicy": "Never",
        "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": expression}}],
    }
    made = [("mutatingadmissionpolicies", policy), ("mutatingadmissionpolicybindings", {"policyName": SIDECAR})]
    try:
        for plural, spec in made:
            body = {"metadata": {"name": SIDECAR}, "spec": spec}
            platform.custom.create_cluster_custom_object(ADMISSION, "v1", plural, body)
    except client.ApiException as error:
        if error.status != 404:
            raise
        yield False
        return
    container = {"name": "trainer", "image": pause_image().name}
    probe = {"metadata": {"name": "probe", "labels": {LABEL_JOB: "sidecar"}}, "spec": {"containers": [container]}}

    def injects() -> bool:
        answer = platform.core.create_namespaced_pod(NAMESPACE, probe, dry_run="All")
        return len(answer.spec.containers) == 2

    wait_for("the API server injects a container", injects, timeout=60)
    yield True
    for plural, _ in reversed(made):
        platform.custom.delete_cluster_custom_object(ADMISSION, "v1", plural, SIDECAR)


@pytest.fixture(scope="module", autouse=True)
def begun(platform: Platform, quota: None, injection: bool) -> Iterator[None]:
    """All runs at once, because each of them mostly waits."""
    platform.apply("quickstart", "half", training=SHORT, podTemplate={"priorityClassName": HALF})
    platform.apply("quickstart", "edited", training=STEPS)
    if injection:
        platform.apply("quickstart", "sidecar", training=SHORT)
    both = {"tasks": {"photographs": TASK}}
    platform.apply("quickstart", "x", training=SHORT, evaluation={**both, "baseline": True})
    platform.apply("quickstart", "x-baseline", training=SHORT, evaluation=both)
    yield
    platform.delete_all()


def active_pods(platform: Platform, run: str, **labels: str) -> list[str]:
    pods = platform.pods(run, **labels)
    return [pod.metadata.name for pod in pods if pod.status.phase not in ("Succeeded", "Failed")]


def test_an_invalid_edit_does_not_keep_a_run_from_being_suspended(platform: Platform) -> None:
    platform.wait("edited", "training", trains)
    platform.change("edited", lora={"languageRank": 0})  # only the operator refuses it
    platform.wait("edited", "Stalled", lambda status: stalled(status) == "LoraRankMissing")
    assert len(active_pods(platform, "edited")) == 2, "the workers of the earlier spec train on"
    platform.change("edited", runPolicy={"suspend": True})
    status = platform.wait("edited", "Suspended", lambda status: status.phase == "Suspended", timeout=120)
    wait_for("no pod is left", lambda: not active_pods(platform, "edited"), timeout=120)
    assert (status.restarts.user, status.restarts.infrastructure) == (0, 0)
    platform.forget("edited")


def test_half_a_group_is_released_and_starts_when_the_quota_admits_all(platform: Platform) -> None:
    status = platform.wait("half", "refused", lambda status: stalled(status) == "QuotaExceeded")
    assert status.stage == "train", "status keeps that preflight has succeeded"
    assert status.stages[0].state == "Succeeded"
    wait_for("the admitted worker is gone", lambda: not active_pods(platform, "half", attempt="1", stage="train"))
    platform.core.patch_namespaced_resource_quota(HALF, NAMESPACE, {"spec": {"hard": {"pods": "2"}}})
    done = platform.wait("half", "Succeeded", lambda status: status.phase == "Succeeded")
    assert (done.restarts.user, done.restarts.infrastructure) == (0, 0)


def test_pods_that_a_sidecar_keeps_alive_are_deleted(platform: Platform, injection: bool) -> None:
    if not injection:
        pytest.skip("this API server does not serve MutatingAdmissionPolicy v1")
    containers = {len(pod.spec.containers) for pod in platform.pods("sidecar")}
    assert containers <= {2}
    platform.follow("sidecar")
    wait_for("no pod of the run is active", lambda: not active_pods(platform, "sidecar"), timeout=120)


def test_runs_whose_names_end_in_a_part_of_a_stage_do_not_meet(platform: Platform) -> None:
    for run in ("x", "x-baseline"):
        done = platform.follow(run)
        assert (done.restarts.user, done.restarts.infrastructure) == (0, 0), run
    names = [pod.metadata.name for run in ("x", "x-baseline") for pod in platform.pods(run)]
    assert len(set(names)) == len(names)
    assert "x-baseline-evaluate-0" in names


def test_a_second_run_keeps_off_an_output_that_another_run_writes(platform: Platform) -> None:
    output = platform.apply("quickstart", "owner", training=STEPS, checkpoint=CHECKPOINT)
    platform.wait("owner", "training", trains)
    platform.apply("quickstart", "guest", training=STEPS, checkpoint=CHECKPOINT, output=output)
    status = platform.wait("guest", "Stalled", lambda status: stalled(status) == "OutputInUse")
    (message,) = [each.message for each in status.conditions if each.type == "Stalled"]
    assert f"{NAMESPACE}/owner" in message
    platform.follow("owner")
    done = platform.wait("guest", "Succeeded", lambda status: status.phase == "Succeeded")
    assert [stage.name for stage in done.stages if stage.state == "Succeeded"] == ["preflight"], (
        "nothing is trained twice"
    )
    assert [each.step for each in losses(platform.s3, output)] == list(range(1, STEPS["maxSteps"] + 1))

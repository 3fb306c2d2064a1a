"""A run survives drain, shutdown, memory pressure and power loss of its node."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from e2e.harness import CHECKPOINT, LONG_STEPS, NAMESPACE, Platform, assert_same_losses, trains
from internvl_api.constants import LABEL_JOB
from internvl_api.status import InternVLFineTuneStatus, StageStatus
from ivft_cluster import helm
from ivft_cluster.shell import wait_for
from ivft_demo.install import Images, chart_values
from ivft_demo.results import Loss, losses
from kubernetes import client

pytestmark = pytest.mark.e2e

DRAIN = ("--ignore-daemonsets", "--delete-emptydir-data")


def start(platform: Platform, name: str) -> tuple[str, InternVLFineTuneStatus]:
    """A run whose two workers train: its output and status."""
    resources = {"requests": {"cpu": "100m", "memory": "512Mi"}}
    template = {"resources": resources, "terminationGracePeriodSeconds": 20}
    output = platform.apply("quickstart", name, training=LONG_STEPS, checkpoint=CHECKPOINT, podTemplate=template)
    return output, platform.wait(name, "training", trains)


def node_of(platform: Platform, pod: str) -> str:
    return str(platform.core.read_namespaced_pod(pod, NAMESPACE).spec.node_name)


def ended_attempt(platform: Platform, name: str, before: InternVLFineTuneStatus) -> StageStatus:
    """The training stage after the next attempt has begun; it has the reason for the last attempt's end."""
    status = platform.wait(name, "a new attempt", lambda status: status.attempt > before.attempt)
    (stage,) = [each for each in status.stages if each.name == "train"]
    return stage


def test_a_drain_waits_for_a_disruption_budget_and_then_costs_no_restart(
    platform: Platform, long_curve: list[Loss]
) -> None:
    output, before = start(platform, "drained")
    drained = node_of(platform, "drained-train-1")
    policy = client.PolicyV1Api(platform.api)
    keep_all = {"maxUnavailable": 0, "selector": {"matchLabels": {LABEL_JOB: "drained"}}}
    policy.create_namespaced_pod_disruption_budget(NAMESPACE, {"metadata": {"name": "drained"}, "spec": keep_all})
    wait_for(
        "the budget counts the workers",
        lambda: policy.read_namespaced_pod_disruption_budget("drained", NAMESPACE).status.expected_pods == 2,
    )
    try:
        with pytest.raises(subprocess.CalledProcessError) as refused:
            platform.cluster.kubectl("drain", drained, *DRAIN, "--timeout=8s", stderr=subprocess.PIPE)
        assert "would violate the pod's disruption budget" in refused.value.stderr
        assert platform.wait("drained", "still the same attempt", trains).attempt == before.attempt

        policy.delete_namespaced_pod_disruption_budget("drained", NAMESPACE)
        platform.cluster.kubectl("drain", drained, *DRAIN, "--timeout=120s")
        stage = ended_attempt(platform, "drained", before)
        assert stage.reason == "Drained", stage.message
    finally:
        platform.cluster.kubectl("uncordon", drained)
    status = platform.follow("drained")
    assert (status.restarts.user, status.restarts.infrastructure) == (0, 0)
    assert_same_losses(losses(platform.s3, output), long_curve)


def test_a_node_that_shuts_down_in_order_loses_no_step(platform: Platform, long_curve: list[Loss]) -> None:
    output, before = start(platform, "shut-down")
    victim = node_of(platform, "shut-down-train-1")
    platform.cluster.shut_down_node(victim)
    try:
        stage = ended_attempt(platform, "shut-down", before)
        assert stage.reason == "NodeShutdown", stage.message
    finally:
        platform.cluster.start_node(victim)
        platform.cluster.wait_nodes_ready()
    status = platform.follow("shut-down")
    assert status.restarts.user == 0
    assert_same_losses(losses(platform.s3, output), long_curve)


@pytest.mark.soak  # a shutdown evicts a worker too
def test_a_worker_evicted_by_memory_pressure_starts_again_elsewhere(platform: Platform, long_curve: list[Loss]) -> None:
    output, before = start(platform, "pressed")
    victim = node_of(platform, "pressed-train-1")
    available = int(platform.cluster.memory_available(victim))
    platform.cluster.set_eviction(victim, "memory.available", str(available + (12 << 30)))
    try:
        stage = ended_attempt(platform, "pressed", before)
        # the evicted worker has a second to tell its peer, which may save its state and end first
        assert stage.reason in ("Evicted", "Resume"), stage.message
        assert ("memory" if stage.reason == "Evicted" else "saved its state") in (stage.message or "")
    finally:
        platform.cluster.set_eviction(victim, "memory.available", "100Mi")
    status = platform.follow("pressed")
    assert status.restarts.user == 0
    assert_same_losses(losses(platform.s3, output), long_curve)


@pytest.fixture
def node_leases(platform: Platform, images: Images) -> Iterator[None]:
    """The chart's value that lets the operator read the Leases of nodes."""
    values = chart_values(images, retryCapSeconds=5)
    helm.upgrade(platform.cluster.kubeconfig, values | {"nodeLeases": True})
    yield
    helm.upgrade(platform.cluster.kubeconfig, values)


def node_of_leader(platform: Platform) -> str:
    """The node of the operator's replica that leads."""
    coordination: Any = client.CoordinationV1Api(platform.api)
    holder = coordination.read_namespaced_lease(helm.RELEASE, helm.NAMESPACE).spec.holder_identity
    pods = platform.core.list_namespaced_pod(helm.NAMESPACE).items
    return next(str(pod.spec.node_name) for pod in pods if holder.startswith(pod.metadata.name))


@pytest.mark.soak  # a killed node's processes may reset their connections: then the peer ends first, as PeerLost
def test_a_node_without_power_is_replaced_before_kubernetes_gives_it_up(
    platform: Platform, long_curve: list[Loss], node_leases: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output, before = start(platform, "powerless")
    # the operator itself goes on: this is about what it sees
    victim = next(name for name in platform.cluster.node_names if name != node_of_leader(platform))
    assert victim in {node_of(platform, f"powerless-train-{rank}") for rank in (0, 1)}
    platform.cluster.kill_node(victim)
    off = time.monotonic()
    try:
        stage = ended_attempt(platform, "powerless", before)
        ended = time.monotonic() - off
        assert stage.reason == "NodeLost", stage.message
        again = platform.wait("powerless", "training again", lambda s: s.attempt > before.attempt and trains(s))
        with capsys.disabled():
            print(
                f"\nno power: the attempt ended after {ended:.0f} s, trains again after {time.monotonic() - off:.0f} s"
            )
        assert victim not in {node_of(platform, f"powerless-train-{rank}") for rank in (0, 1)}
        assert again.restarts.user == 0
    finally:
        platform.cluster.start_node(victim)
        platform.cluster.wait_nodes_ready()
    platform.follow("powerless")
    assert_same_losses(losses(platform.s3, output), long_curve)

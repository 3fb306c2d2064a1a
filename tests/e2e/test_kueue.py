"""Three runs and one quota under real Kueue: waiting, preemption, return, and the losses of an undisturbed run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from e2e.harness import CHECKPOINT, LONG_STEPS, NAMESPACE, STEPS, Platform, assert_same_losses, trains
from internvl_api.constants import GPU
from internvl_api.status import InternVLFineTuneStatus
from internvl_operator.kubectl_ivft.__main__ import main as kubectl_ivft
from ivft_cluster import kueue
from ivft_cluster.shell import wait_for
from ivft_demo.follow import read_status
from ivft_demo.results import Loss, losses

pytestmark = pytest.mark.e2e

KUEUE = ("kueue.x-k8s.io", "v1beta2")
QUOTA = 2  # GPUs
TWO_WORKERS = {"workers": 2, "gpusPerWorker": 1}
ONE_WORKER = {"workers": 1, "gpusPerWorker": 2}
HIGH = "kueue-high"  # a WorkloadPriorityClass
PRIORITY = "kueue.x-k8s.io/priority-class"
OBJECTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("resourceflavors", {"kind": "ResourceFlavor", "metadata": {"name": "any-node"}}),
    (
        "workloadpriorityclasses",
        {"kind": "WorkloadPriorityClass", "metadata": {"name": HIGH}, "value": 1000, "description": "first"},
    ),
    (
        "clusterqueues",
        {
            "kind": "ClusterQueue",
            "metadata": {"name": "gpus"},
            "spec": {
                "namespaceSelector": {},
                "preemption": {"withinClusterQueue": "LowerPriority"},
                "resourceGroups": [
                    {
                        "coveredResources": ["cpu", "memory", "ephemeral-storage", GPU],
                        "flavors": [
                            {
                                "name": "any-node",
                                "resources": [
                                    {"name": "cpu", "nominalQuota": "64"},
                                    {"name": "memory", "nominalQuota": "256Gi"},
                                    {"name": "ephemeral-storage", "nominalQuota": "1Ti"},
                                    {"name": GPU, "nominalQuota": str(QUOTA)},
                                ],
                            }
                        ],
                    }
                ],
            },
        },
    ),
)
LOCAL_QUEUE = {"kind": "LocalQueue", "metadata": {"name": "team"}, "spec": {"clusterQueue": "gpus"}}


@dataclass(frozen=True)
class Queue:
    """The queue, with the number of GPUs of its admitted workloads."""

    custom: Any

    def gpus_in_use(self) -> int:
        found = self.custom.get_cluster_custom_object(*KUEUE, "clusterqueues", "gpus")
        flavors = (found.get("status") or {}).get("flavorsUsage") or []
        return sum(int(each["total"]) for flavor in flavors for each in flavor["resources"] if each["name"] == GPU)

    def workload(self, name: str) -> dict[str, Any]:
        return dict(self.custom.get_namespaced_custom_object(*KUEUE, NAMESPACE, "workloads", name))

    def workloads(self) -> list[str]:
        found = self.custom.list_namespaced_custom_object(*KUEUE, NAMESPACE, "workloads")["items"]
        return [each["metadata"]["name"] for each in found]


@pytest.fixture(scope="module")
def queue(platform: Platform) -> Iterator[Queue]:
    """Kueue with a ClusterQueue of two GPUs; each node has two GPUs, one more than a worker of a group needs."""
    kueue.install(platform.cluster)
    for node in platform.cluster.node_names:
        platform.cluster.add_devices(node, GPU, QUOTA)
    custom = platform.custom
    for plural, body in OBJECTS:
        wait_for(plural, lambda plural=plural, body=body: create(custom, plural, body), timeout=60)
    body = {"apiVersion": "/".join(KUEUE), **LOCAL_QUEUE}
    custom.create_namespaced_custom_object(*KUEUE, NAMESPACE, "localqueues", body)
    yield Queue(custom)
    platform.delete_all()
    custom.delete_namespaced_custom_object(*KUEUE, NAMESPACE, "localqueues", "team")
    for plural, body in reversed(OBJECTS):
        custom.delete_cluster_custom_object(*KUEUE, plural, body["metadata"]["name"])
    for node in platform.cluster.node_names:
        platform.cluster.remove_devices(node, GPU)
    kueue.uninstall(platform.cluster)


def create(custom: Any, plural: str, body: dict[str, Any]) -> bool:
    """Create an object; retries until Kueue's webhook has its certificate."""
    custom.create_cluster_custom_object(*KUEUE, plural, {"apiVersion": "/".join(KUEUE), **body})
    return True


def submit(platform: Platform, name: str, training: dict[str, int] = STEPS, **more: Any) -> str:
    """A run with two processes that each hold one fake GPU and train on the CPU."""
    template = {
        "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}},
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}, {"name": "INTERNVL_DEVICE", "value": "cpu"}],
        "labels": more.pop("labels", {}),
    }
    return platform.apply(
        "quickstart",
        name,
        **more.pop("size", TWO_WORKERS),
        training=training,
        checkpoint=CHECKPOINT,
        scheduling={"gang": "kueue", "queue": "team"},
        podTemplate=template,
    )


def gated(status: InternVLFineTuneStatus) -> bool:
    return status.stage == "train" and any(each.reason == "SchedulingGated" for each in status.conditions)


def pods_started(platform: Platform, name: str) -> list[float]:
    pods = platform.pods(name, stage="train")
    return [pod.status.start_time.timestamp() for pod in pods if pod.status.start_time]


def test_the_queue_admits_one_run_after_the_other(
    platform: Platform, queue: Queue, long_curve: list[Loss], capsys: pytest.CaptureFixture[str]
) -> None:
    """Three runs through the queue: status while each waits, is preempted, resumes and succeeds."""
    told: list[tuple[str, float]] = []
    begun = time.monotonic()

    def tell(what: str) -> None:
        told.append((what, time.monotonic() - begun))

    output = submit(platform, "first", LONG_STEPS)
    platform.wait("first", "training", trains)
    tell("the first run trains")
    assert queue.gpus_in_use() == QUOTA
    assert len(pods_started(platform, "first")) == TWO_WORKERS["workers"]

    # No quota is left: the second run waits with Kueue's own reason, and its preflight holds no GPU.
    submit(platform, "second")
    third_output = submit(platform, "third", labels={PRIORITY: HIGH})
    platform.wait("second", "held by its queue", gated)
    tell("the second run waits")
    assert not pods_started(platform, "second")
    command = ["why", "second", "-n", NAMESPACE, "--kubeconfig", str(platform.cluster.kubeconfig)]
    wait_for("Kueue's reason", lambda: explained(command, capsys), timeout=60)

    # Kueue preempts the first run for the third, which has a higher priority. The first run saves a checkpoint, frees
    # its GPUs and waits in the queue again.
    resource = platform.wait_resource("first", "preempted", lambda status: status.attempt > 1)
    tell("the first run is preempted")
    (stage,) = [each for each in read_status(resource).stages if each.name == "train"]
    assert stage.reason == "Preempted", stage.message
    preempted = read_status(resource)
    assert (preempted.restarts.user, preempted.restarts.infrastructure) == (0, 0)
    assert preempted.checkpoint is not None

    platform.wait("third", "training", trains)
    tell("the third run trains")
    assert queue.gpus_in_use() == QUOTA
    assert not pods_started(platform, "first")
    platform.follow("third")
    tell("the third run is done")

    platform.follow("first")
    tell("the first run is done")
    platform.follow("second")
    tell("the second run is done")

    assert [each.step for each in losses(platform.s3, third_output)] == list(range(1, STEPS["maxSteps"] + 1))
    assert_same_losses(losses(platform.s3, output), long_curve)
    wait_for("every GPU is free", lambda: queue.gpus_in_use() == 0)
    with capsys.disabled():
        print("\nKueue: " + "; ".join(f"{what} {seconds:.0f} s" for what, seconds in told))


def explained(command: list[str], capsys: pytest.CaptureFixture[str]) -> bool:
    assert kubectl_ivft(command) == 0
    shown = capsys.readouterr().out
    return "SchedulingGated" in shown and f"insufficient unused quota for {GPU}" in shown


def test_a_group_that_exceeds_the_quota_shows_the_reason(
    platform: Platform, queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kueue admits the group as a whole: no pod starts although half of them would fit."""
    platform.apply(
        "quickstart",
        "too-large",
        workers=4,
        gpusPerWorker=1,
        training={"globalBatchSize": 16},
        scheduling={"gang": "kueue", "queue": "team"},
    )
    platform.wait("too-large", "held by its queue", gated)
    command = ["why", "too-large", "-n", NAMESPACE, "--kubeconfig", str(platform.cluster.kubeconfig)]

    def maximum_is_named() -> bool:
        assert kubectl_ivft(command) == 0
        return f"insufficient quota for {GPU}" in capsys.readouterr().out

    wait_for("Kueue's reason", maximum_is_named, timeout=60)
    assert not pods_started(platform, "too-large")
    assert queue.gpus_in_use() == 0
    platform.delete("too-large")
    wait_for("Kueue keeps no workload of it", lambda: not [w for w in queue.workloads() if "too-large" in w])


def test_a_queued_run_that_is_suspended_leaves_the_queue(platform: Platform, queue: Queue) -> None:
    submit(platform, "held", LONG_STEPS, size=ONE_WORKER)
    platform.wait("held", "training", trains)
    platform.change("held", runPolicy={"suspend": True})
    platform.wait("held", "Suspended", lambda status: status.phase == "Suspended")
    wait_for("its GPUs are free", lambda: queue.gpus_in_use() == 0)
    platform.change("held", runPolicy={"suspend": False})
    platform.wait("held", "training", trains)
    platform.delete("held")
    wait_for("its GPUs are free", lambda: queue.gpus_in_use() == 0)

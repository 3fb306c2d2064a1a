"""Why a control plane ends pods, as it says itself: eviction, taint, deletion; each has its own reason and budget."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from controller.builders import Raw, result
from controller.operator_process import Cluster, OperatorProcess
from ivft_cluster.api_server import CONTROLLERS, ApiServer
from ivft_cluster.crds import install_crd
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.shell import wait_for

pytestmark = pytest.mark.integration

TAINTS = ("node-lifecycle-controller", "taint-eviction-controller")
Act = Callable[[Cluster, str], object]


class PatientKubelet(FakeKubelet):
    """Its workers use their grace period, as those do that save a checkpoint."""

    def _delete(self, pod: Any) -> None:
        pass


@pytest.fixture(scope="module")
def tainting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A server whose control plane ends pods on tainted nodes."""
    with ApiServer(tmp_path_factory.mktemp("tainting"), (*CONTROLLERS, *TAINTS)) as server:
        install_crd(server)
        yield server


def evict(cluster: Cluster, pod: str) -> None:
    """What `kubectl drain` does."""
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
    cluster.core.create_namespaced_pod_eviction(pod, cluster.namespace, body)


def taint(cluster: Cluster, pod: str) -> None:
    """What an administrator does to empty a node at once."""
    node = cluster.core.read_namespaced_pod(pod, cluster.namespace).spec.node_name
    taints = [{"key": "example.org/maintenance", "effect": "NoExecute"}]
    cluster.core.patch_node(node, {"spec": {"taints": taints}})


def delete(cluster: Cluster, pod: str) -> None:
    cluster.core.delete_namespaced_pod(pod, cluster.namespace, grace_period_seconds=0)


@pytest.mark.parametrize(
    ("act", "reason", "words", "restarts"),
    [
        pytest.param(evict, "Drained", "EvictionByEvictionAPI: Eviction API: evicting", 0, id="evicted"),
        pytest.param(taint, "NodeTainted", "its node got a NoExecute taint", 1, id="tainted"),
        # whether the operator saw the pod while it was terminating
        pytest.param(delete, "WorkerLost|WorkerDeleted", "disappeared|was deleted", 1, id="deleted"),
    ],
)
def test_a_worker_that_is_taken_away(
    tainting: ApiServer, tmp_path: Path, act: Act, reason: str, words: str, restarts: int
) -> None:
    with (
        tainting.namespace("ivft") as namespace,
        PatientKubelet(tainting.api) as kubelet,
        OperatorProcess(cluster := Cluster(tainting, namespace), tmp_path),
    ):
        cluster.create()
        kubelet.wait_phase(namespace, "run-preflight-0")
        kubelet.finish(namespace, "run-preflight-0", message=json.dumps(result("preflight")))
        for rank in (0, 1):
            kubelet.wait_phase(namespace, f"run-train-{rank}")
        cluster.wait_workers(2)
        act(cluster, "run-train-1")
        status = cluster.wait("the attempt ended", lambda status: status["attempt"] == 2)
        ended = wait_for("an event tells", lambda: ends(cluster))
    assert status["restarts"] == {"user": 0, "infrastructure": restarts}
    assert re.fullmatch(reason, status["stages"][1]["reason"])
    assert re.search(words, ended[0])


def ends(cluster: Cluster) -> list[str]:
    """Messages of the events about ended attempts."""
    found: list[Raw] = cluster.core.list_namespaced_event(cluster.namespace).items
    return [event.message for event in found if event.reason == "AttemptEnded"]  # type: ignore[attr-defined]

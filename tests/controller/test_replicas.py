"""Two replicas and one Lease on a real API server: who is stopped, cut off or told to end writes nothing afterwards."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from controller.builders import result
from controller.faulty_proxy import FaultyProxy, Unreachable
from controller.operator_process import Cluster, OperatorProcess
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.shell import wait_for
from kubernetes import client

pytestmark = pytest.mark.integration

LOST = 3  # the exit code of a replica that may not lead any more


class Replica(OperatorProcess):
    """One of two; whatever it writes goes through its own proxy."""

    def __init__(self, cluster: Cluster, folder: Path, proxy: FaultyProxy, lease_seconds: float) -> None:
        folder.mkdir()
        settings = {"LEADER_ELECTION": "true", "LEASE_NAMESPACE": cluster.namespace, "RESYNC_SECONDS": "2"}
        super().__init__(cluster, folder, proxy.kubeconfig, LEASE_SECONDS=str(lease_seconds), **settings)
        self.proxy = proxy

    def leads(self) -> bool:
        return self.metric("internvl_operator_leader") == 1


class Pair:
    """`leader` works, `other` stands by."""

    def __init__(self, one: Replica, two: Replica) -> None:
        wait_for("one of them leads", lambda: one.leads() or two.leads())
        self.leader, self.other = (one, two) if one.leads() else (two, one)
        wait_for("it works", self.leader.ready)


@pytest.fixture
def pair(cluster_of_test: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pair]:
    with ExitStack() as stack:
        proxies = [stack.enter_context(FaultyProxy(cluster_of_test.server, tmp_path)) for _ in range(2)]
        replicas = [
            Replica(cluster_of_test, tmp_path / str(number), proxy, getattr(request, "param", 9))
            for number, proxy in enumerate(proxies)
        ]
        yield Pair(*[stack.enter_context(replica) for replica in replicas])


def finish(cluster: Cluster, kubelet: FakeKubelet, stage: str, pods: int = 1) -> None:
    for rank in range(pods):
        kubelet.wait_phase(cluster.namespace, f"run-{stage}-{rank}", timeout=60)
        kubelet.finish(cluster.namespace, f"run-{stage}-{rank}", message=json.dumps(result(stage)))


def assert_each_pod_was_made_once(cluster: Cluster) -> None:
    made = [pod.metadata.name for kind, pod in cluster.history(cluster.core.list_namespaced_pod) if kind == "ADDED"]
    assert sorted(made) == ["run-preflight-0", "run-publish-0", "run-train-0", "run-train-1"]
    assert cluster.get()["status"]["attempt"] == 1


def test_the_one_that_stands_by_writes_nothing(cluster_of_test: Cluster, kubelet: FakeKubelet, pair: Pair) -> None:
    cluster_of_test.create()
    finish(cluster_of_test, kubelet, "preflight")
    kubelet.wait_phase(cluster_of_test.namespace, "run-train-1")
    assert pair.other.ready()
    assert pair.leader.proxy.writes
    assert [request for request in pair.other.proxy.requests if "/leases" not in request.path] == []


def test_a_stopped_leader_writes_nothing_when_it_wakes_up(
    cluster_of_test: Cluster, kubelet: FakeKubelet, pair: Pair
) -> None:
    cluster = cluster_of_test
    cluster.create()
    finish(cluster, kubelet, "preflight")
    kubelet.wait_phase(cluster.namespace, "run-train-1")
    pair.leader.signal(signal.SIGSTOP)
    wait_for("the other leads", pair.other.leads)
    finish(cluster, kubelet, "train", 2)  # there is something to be done that the first has not heard of
    kubelet.wait_phase(cluster.namespace, "run-publish-0", timeout=60)
    woken = time.monotonic()
    pair.leader.signal(signal.SIGCONT)
    assert pair.leader.ended() == LOST
    finish(cluster, kubelet, "publish")
    cluster.wait_condition("Complete")
    late = [request for request in pair.leader.proxy.writes if request.at > woken]
    assert late == []
    assert_each_pod_was_made_once(cluster)


def test_a_leader_that_is_cut_off_ends_by_itself(cluster_of_test: Cluster, kubelet: FakeKubelet, pair: Pair) -> None:
    cluster_of_test.create()
    finish(cluster_of_test, kubelet, "preflight")
    kubelet.wait_phase(cluster_of_test.namespace, "run-train-1")
    pair.leader.proxy.fault = lambda request: Unreachable()
    pair.leader.proxy.cut()
    assert pair.leader.ended() == LOST
    finish(cluster_of_test, kubelet, "train", 2)
    finish(cluster_of_test, kubelet, "publish")
    cluster_of_test.wait_condition("Complete")
    assert_each_pod_was_made_once(cluster_of_test)


@pytest.mark.parametrize("pair", [pytest.param(600, id="a-lease-of-ten-minutes")], indirect=True)
def test_a_leader_that_is_told_to_end_gives_the_lease_back(cluster_of_test: Cluster, pair: Pair) -> None:
    leases: Any = client.CoordinationV1Api(cluster_of_test.server.api)
    assert pair.leader.terminate() == 0
    lease = leases.read_namespaced_lease("internvl-operator", cluster_of_test.namespace)
    assert not lease.spec.holder_identity
    assert pair.other.terminate() == 0  # standing by, it hears that too

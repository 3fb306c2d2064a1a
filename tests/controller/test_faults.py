"""A real API server behind a bad line: refusals, lost answers, broken and silent watches, expired versions."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from controller.builders import Raw, result
from controller.faulty_proxy import Answer, AnswerLost, Fault, FaultyProxy, Request, Unreachable
from controller.operator_process import Cluster, OperatorProcess
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.shell import tail, wait_for

pytestmark = pytest.mark.integration

# Watches that end soon, so that a silent one is given up soon.
SHORT = {"WATCH_TIMEOUT_SECONDS": "2", "REQUEST_TIMEOUT_SECONDS": "5"}


@pytest.fixture
def proxy(cluster_of_test: Cluster, tmp_path: Path) -> Iterator[FaultyProxy]:
    with FaultyProxy(cluster_of_test.server, tmp_path) as between:
        yield between


@pytest.fixture
def operator(cluster_of_test: Cluster, proxy: FaultyProxy, tmp_path: Path) -> Iterator[OperatorProcess]:
    with OperatorProcess(cluster_of_test, tmp_path, proxy.kubeconfig, **SHORT) as running:
        yield running


def to_the_end(cluster: Cluster, kubelet: FakeKubelet) -> None:
    """Every pod succeeds as soon as it runs."""
    for stage, pods in (("preflight", 1), ("train", 2), ("publish", 1)):
        for rank in range(pods):
            kubelet.wait_phase(cluster.namespace, f"run-{stage}-{rank}", timeout=60)
            kubelet.finish(cluster.namespace, f"run-{stage}-{rank}", message=json.dumps(result(stage)))
    cluster.wait_condition("Complete")


def assert_nothing_was_done_twice(cluster: Cluster) -> None:
    made = Counter(
        pod.metadata.name for kind, pod in cluster.history(cluster.core.list_namespaced_pod) if kind == "ADDED"
    )
    assert made == {"run-preflight-0": 1, "run-train-0": 1, "run-train-1": 1, "run-publish-0": 1}
    status = cluster.get()["status"]
    assert (status["attempt"], status["restarts"]) == (1, {"user": 0, "infrastructure": 0})


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Answer(409, "the object has been modified"), id="409"),
        pytest.param(Answer(429, "too many requests"), id="429"),
        pytest.param(Answer(500, "etcdserver: request timed out"), id="500"),
        pytest.param(AnswerLost(), id="answer-lost"),
        pytest.param(Unreachable(), id="connection-refused"),
    ],
)
def test_writes_that_fail_now_and_then(
    cluster_of_test: Cluster, kubelet: FakeKubelet, proxy: FaultyProxy, operator: OperatorProcess, fault: Fault
) -> None:
    chance, failed = random.Random(7), []

    def sometimes(request: Request) -> Fault:
        if request.write and "/events" not in request.path and chance.random() < 0.2:
            failed.append(request)
            return fault
        return None

    proxy.fault = sometimes
    cluster_of_test.create()
    to_the_end(cluster_of_test, kubelet)
    assert failed
    assert_nothing_was_done_twice(cluster_of_test)


def test_watches_that_break_all_the_time(
    cluster_of_test: Cluster, kubelet: FakeKubelet, proxy: FaultyProxy, operator: OperatorProcess
) -> None:
    chance = random.Random(7)

    def often(request: Request) -> Fault:
        if chance.random() < 0.3:
            proxy.cut()
        return None

    proxy.fault = often
    cluster_of_test.create()
    to_the_end(cluster_of_test, kubelet)
    assert_nothing_was_done_twice(cluster_of_test)


def test_watches_that_fall_silent_are_given_up(
    cluster_of_test: Cluster, kubelet: FakeKubelet, proxy: FaultyProxy, operator: OperatorProcess
) -> None:
    cluster_of_test.create()
    kubelet.wait_phase(cluster_of_test.namespace, "run-preflight-0")
    before = len([request for request in proxy.requests if request.watch])
    proxy.flowing.clear()  # open streams stay open and say nothing, not even that they end
    kubelet.finish(cluster_of_test.namespace, "run-preflight-0", message=json.dumps(result("preflight")))
    wait_for("new watches", lambda: len([each for each in proxy.requests if each.watch]) >= before + 3, timeout=60)
    proxy.flowing.set()
    for rank in (0, 1):
        kubelet.wait_phase(cluster_of_test.namespace, f"run-train-{rank}", timeout=60)
    assert operator.ready()


RESYNC = 4.0  # seconds; a watch lasts for as long as the test


@pytest.fixture
def forgetful(cluster_of_test: Cluster, proxy: FaultyProxy, tmp_path: Path) -> Iterator[OperatorProcess]:
    """An operator whose watches last: what they leave out is lost, unless it looks by itself."""
    settings = {"WATCH_TIMEOUT_SECONDS": "600", "RESYNC_SECONDS": str(RESYNC)}
    with OperatorProcess(cluster_of_test, tmp_path, proxy.kubeconfig, **settings) as running:
        yield running


def within_the_interval(what: str, holds: Callable[[], object]) -> None:
    wait_for(what, holds, timeout=RESYNC + 6)  # the list itself, the pass and the fake node take their time


def test_the_end_of_a_pod_of_which_no_event_comes(
    cluster_of_test: Cluster, kubelet: FakeKubelet, proxy: FaultyProxy, forgetful: OperatorProcess
) -> None:
    lost = []

    def end_of_preflight(event: Raw) -> bool:
        found = event["object"]
        ours = found["metadata"].get("name") == "run-preflight-0" and found["status"]["phase"] == "Succeeded"
        lost.extend([event] * ours)
        return bool(ours)

    cluster_of_test.create()
    kubelet.wait_phase(cluster_of_test.namespace, "run-preflight-0")
    proxy.lost = end_of_preflight
    kubelet.finish(cluster_of_test.namespace, "run-preflight-0", message=json.dumps(result("preflight")))
    within_the_interval("training begins", lambda: "run-train-1" in cluster_of_test.pods())
    assert lost


def test_a_pod_that_goes_and_a_run_that_is_edited_without_an_event(
    cluster_of_test: Cluster, kubelet: FakeKubelet, proxy: FaultyProxy, forgetful: OperatorProcess
) -> None:
    cluster_of_test.create()
    kubelet.wait_phase(cluster_of_test.namespace, "run-preflight-0")
    kubelet.finish(cluster_of_test.namespace, "run-preflight-0", message=json.dumps(result("preflight")))
    cluster_of_test.wait_workers(2)
    proxy.lost = lambda event: event["object"]["metadata"].get("name") == "run-train-0"
    cluster_of_test.core.delete_namespaced_pod("run-train-0", cluster_of_test.namespace, grace_period_seconds=0)
    within_the_interval("the loss is noticed", lambda: cluster_of_test.get()["status"]["attempt"] == 2)
    proxy.lost = lambda event: event["object"]["kind"] == "InternVLFineTune"
    cluster_of_test.edit({"runPolicy": {"suspend": True}})
    within_the_interval("the run is held", lambda: cluster_of_test.get()["status"]["phase"] == "Suspended")


def test_looking_again_writes_nothing(
    cluster_of_test: Cluster, kubelet: FakeKubelet, proxy: FaultyProxy, forgetful: OperatorProcess
) -> None:
    cluster_of_test.create()
    kubelet.wait_phase(cluster_of_test.namespace, "run-preflight-0")
    cluster_of_test.wait("preflight runs", lambda status: status["phase"] == "Running")
    looked, written = len(proxy.requests), len(proxy.writes)

    def lists() -> set[str]:
        return {each.path.rpartition("/")[2] for each in proxy.requests[looked:] if "limit" in each.query}

    wait_for("every kind is listed", lambda: {"pods", "services", "configmaps", "internvlfinetunes"} <= lists())
    assert proxy.writes[written:] == []


def test_an_expired_version_lists_again(
    cluster_of_test: Cluster, kubelet: FakeKubelet, proxy: FaultyProxy, operator: OperatorProcess
) -> None:
    refused = Counter[str]()
    words = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version: 1 (2)"}
    event = json.dumps({"type": "ERROR", "object": words}) + "\n"

    def expired(request: Request) -> Fault:
        if request.watch and refused[request.path] < 2:
            refused[request.path] += 1
            return Answer(200, body=event)
        return None

    proxy.fault = expired
    proxy.cut()
    wait_for(
        "every watch was refused",
        lambda: len(refused) >= 4 and min(refused.values()) >= 2,
        on_timeout=lambda: f"{refused}\n{tail(operator.log)}",
    )
    cluster_of_test.create()
    to_the_end(cluster_of_test, kubelet)
    assert_nothing_was_done_twice(cluster_of_test)


def test_a_watch_that_is_refused_outright_ends_the_process_and_the_next_one_goes_on(
    cluster_of_test: Cluster, kubelet: FakeKubelet, proxy: FaultyProxy, operator: OperatorProcess
) -> None:
    cluster_of_test.create()
    kubelet.wait_phase(cluster_of_test.namespace, "run-preflight-0")
    proxy.fault = lambda request: Answer(410, "gone") if request.watch else None
    proxy.cut()
    assert operator.ended() != 0
    proxy.fault = lambda request: None
    operator.start()
    to_the_end(cluster_of_test, kubelet)
    assert_nothing_was_done_twice(cluster_of_test)

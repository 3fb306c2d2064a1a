"""What no user should make, and somebody will: the operator lives, tells, and leaves it at that.

Each case runs beside healthy runs. One of them begins and ends while the bad object is there: the operator works, and
as it has made dozens of passes meanwhile, what it wrote about the bad object in that time is all it will ever write.
"""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from controller.builders import Raw, result, spec
from controller.faulty_proxy import FaultyProxy, Request
from controller.operator_process import Cluster, OperatorProcess
from internvl_api.constants import (
    API_VERSION,
    GROUP,
    KIND,
    LABEL_ATTEMPT,
    LABEL_MANAGED_BY,
    LABEL_NODE_RANK,
    LABEL_STAGE,
    MANAGED_BY,
    PLURAL,
    VERSION,
)
from internvl_operator.core.resources import names
from ivft_cluster.api_server import ApiServer
from ivft_cluster.crds import install_crd, load_crd
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.shell import wait_for
from kubernetes.client.exceptions import ApiException

pytestmark = pytest.mark.integration

STAGES = (("preflight", 1), ("train", 2), ("publish", 1))


class Scene:
    """A namespace, its nodes, and an operator whose requests are recorded."""

    def __init__(self, cluster: Cluster, kubelet: FakeKubelet, proxy: FaultyProxy, operator: OperatorProcess) -> None:
        self.cluster, self.kubelet, self.proxy, self.operator = cluster, kubelet, proxy, operator

    def finish(self, run: str) -> None:
        """Every pod of a run succeeds as soon as it runs."""
        for stage, pods in STAGES:
            for rank in range(pods):
                pod = names.pod(run, stage, rank)
                self.kubelet.wait_phase(self.cluster.namespace, pod, timeout=60)
                self.kubelet.finish(self.cluster.namespace, pod, message=json.dumps(result(stage)))
        self.cluster.wait_condition("Complete", name=run)

    def healthy(self, run: str) -> None:
        """A run from its creation to its end."""
        self.cluster.create(run)
        self.finish(run)

    def about(self, run: str) -> list[Request]:
        """What was written about a run: its status, its children (which are named after it), not the events."""
        wanted = (f"/{run}/", f"/{names.base(run)}-", f"/ivft-{names.base(run)}")
        return [
            request
            for request in self.proxy.writes
            if "/events" not in request.path and any(part in f"{request.path}/" for part in wanted)
        ]

    def assert_quiet(self, run: str) -> None:
        """Not one write about a run while a healthy run goes from its beginning to its end; the process is the same."""
        pid, before = self.operator.pid, len(self.about(run))
        self.healthy(f"healthy-beside-{len(self.proxy.writes)}")
        assert [request.path for request in self.about(run)[before:]] == []
        assert self.operator.ready()
        assert self.operator.pid == pid

    def warnings(self, run: str) -> list[str]:
        """Messages of the events that warn about a run."""
        found = self.cluster.core.list_namespaced_event(self.cluster.namespace).items
        return [event.message for event in found if event.type == "Warning" and event.involved_object.name == run]


@pytest.fixture
def scene(cluster_of_test: Cluster, kubelet: FakeKubelet, tmp_path: Path) -> Iterator[Scene]:
    with (
        FaultyProxy(cluster_of_test.server, tmp_path) as proxy,
        OperatorProcess(cluster_of_test, tmp_path, proxy.kubeconfig) as operator,
    ):
        yield Scene(cluster_of_test, kubelet, proxy, operator)


def datasets(count: int, characters: int) -> Raw:
    """So many datasets, each with addresses of so many characters in all."""
    far = f"s3://data/{'x' * (characters - 20)}.jsonl"
    return {"train": {f"set-{number:04d}": {"annotation": far} for number in range(count)}}


# --- objects that are too large


def test_a_resource_of_hundreds_of_kilobytes_is_run(scene: Scene) -> None:
    scene.cluster.create(data=datasets(900, 700))
    scene.finish("run")
    scene.assert_quiet("run")


def test_a_resource_whose_run_yaml_is_too_large_is_explained(scene: Scene) -> None:
    """A ConfigMap takes 1 MiB; the resource itself may have half as much again."""
    scene.cluster.create(data=datasets(1000, 1100))
    stalled = scene.cluster.wait_condition_seen("Stalled", "InvalidChild")
    assert "ConfigMap ivft-run" in stalled["message"]
    assert "1048576" in stalled["message"]
    assert_backs_off(scene, "/configmaps/ivft-run")


def assert_backs_off(scene: Scene, path: str) -> None:
    """A failed pass is made again after 0.2, 0.4, 0.8 … seconds, with two writes at most: one, and why it failed."""

    def pauses() -> list[float]:
        said = re.findall(r"/run: .*; retrying in ([0-9.]+) s", scene.operator.log_text)
        return [float(seconds) for seconds in said]

    scene.healthy("healthy")
    wait_for("five passes", lambda: len(pauses()) >= 5)
    writes = len([request for request in scene.proxy.writes if request.path.endswith(path)])
    assert pauses()[:5] == [0.2, 0.4, 0.8, 1.6, 3.2]
    assert writes <= 2 * (len(pauses()) + 1)
    assert scene.operator.ready()


# --- names


def test_names_that_are_not_ascii(scene: Scene) -> None:
    with pytest.raises(ApiException, match="RFC 1123"):
        scene.cluster.create("läuft")
    strange = {"photos": "s3://data/фото.jsonl", "dogs": "s3://data/犬 🐶.jsonl", "a..b": "s3://data/b.jsonl"}
    scene.cluster.create(data={"train": {name: {"annotation": address} for name, address in strange.items()}})
    scene.cluster.patch({"metadata": {"annotations": {"bemerkung": "Grüße 🐶 " * 1000}}})
    scene.kubelet.wait_phase(scene.cluster.namespace, "run-preflight-0")
    mounted = scene.cluster.core.read_namespaced_config_map("ivft-run", scene.cluster.namespace).data["run.yaml"]
    assert {name: each["annotation"] for name, each in yaml.safe_load(mounted)["data"]["train"].items()} == strange
    scene.finish("run")
    scene.assert_quiet("run")


def test_long_names_that_begin_alike(scene: Scene) -> None:
    """Children's names end with a digest of the whole name, and fit where 63 characters are the limit."""
    runs = ["x" * 253, "x" * 252 + "y", "x" * 64, "v1.5-" + "x" * 240 + ".run"]
    for run in runs:
        scene.cluster.create(run)
    for run in runs:
        scene.finish(run)
    children = scene.cluster.children()
    assert children["Service"] == children["ConfigMap"] == sorted(names.service(run) for run in runs)
    assert children["Pod"] == sorted(names.pod(run, *member) for run in runs for member in (("preflight", 0),
        ("train", 0), ("train", 1), ("publish", 0)))  # fmt: skip
    assert all(len(name) <= 63 for kind in children.values() for name in kind)
    events = scene.cluster.core.list_namespaced_event(scene.cluster.namespace).items
    assert {event.involved_object.name for event in events} == set(runs)
    scene.assert_quiet(runs[0])


# --- pods that are not ours


@pytest.mark.parametrize("owned", [pytest.param(False, id="labels-alone"), pytest.param(True, id="and-a-forged-owner")])
def test_a_foreign_pod_that_looks_like_ours_is_left_alone(scene: Scene, owned: bool) -> None:
    run = scene.cluster.create()
    scene.kubelet.wait_phase(scene.cluster.namespace, "run-preflight-0")
    labels = {LABEL_MANAGED_BY: MANAGED_BY, LABEL_STAGE: "preflight", LABEL_ATTEMPT: "1", LABEL_NODE_RANK: "0"}
    owner = {"apiVersion": API_VERSION, "kind": KIND, "name": "run", "uid": run["metadata"]["uid"], "controller": True}
    for name, wrong in (("mine", {}), ("mine-too", {LABEL_NODE_RANK: "7"}), ("mine-also", {LABEL_ATTEMPT: "x"})):
        metadata = {"name": name, "labels": labels | wrong} | ({"ownerReferences": [owner]} if owned else {})
        body = {"metadata": metadata, "spec": {"containers": [{"name": "trainer", "image": "mine"}]}}
        scene.cluster.core.create_namespaced_pod(scene.cluster.namespace, body)
    scene.finish("run")
    status = scene.cluster.get()["status"]
    assert (status["attempt"], status["restarts"]) == (1, {"user": 0, "infrastructure": 0})
    scene.assert_quiet("run")
    assert {"mine", "mine-too", "mine-also"} <= set(scene.cluster.pods())
    assert not [request for request in scene.proxy.writes if "/pods/mine" in request.path]


# --- a status that somebody else wrote


GARBAGE = [
    pytest.param({"attempt": -7, "failures": -1, "restarts": {"user": -5}}, id="numbers-below-zero"),
    pytest.param({"attempt": 2**40, "failures": 2**40, "observedGeneration": 2**40}, id="numbers-too-large"),
    pytest.param({"retryAt": "soon", "startedAt": "yesterday", "progressAt": "0000-00-00"}, id="times-that-are-none"),
    pytest.param({"stages": [], "conditions": [], "phase": "Failed", "stage": "publish"}, id="nothing-in-it"),
    pytest.param({"stages": [{"name": "publish", "state": "Running", "attempt": 9}]}, id="a-stage-of-its-own"),
    pytest.param({"conditions": [{"type": "Ready", "status": "True", "reason": "Because"}]}, id="half-a-condition"),
    pytest.param({"checkpoint": {"step": -1, "uri": "here", "sha256": "x", "verifiedAt": "never"}}, id="a-checkpoint"),
    pytest.param({"runDigest": "mine", "microBatchSize": -3, "progressText": "犬" * 5000}, id="words"),
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_status_of_garbage_does_not_stop_a_run(scene: Scene, garbage: Raw) -> None:
    scene.cluster.create()
    scene.kubelet.wait_phase(scene.cluster.namespace, "run-preflight-0")
    scene.cluster.wait("preflight runs", lambda status: status["phase"] == "Running")
    scene.cluster.patch_status(garbage)
    to_the_end(scene)
    scene.assert_quiet("run")


def to_the_end(scene: Scene) -> None:
    """Whatever attempt there is: every pod that runs succeeds, until the run is complete."""

    def complete() -> bool:
        for pod in scene.cluster.core.list_namespaced_pod(scene.cluster.namespace).items:
            if pod.status.phase == "Running" and not pod.metadata.deletion_timestamp:
                message = json.dumps(result(pod.metadata.labels[LABEL_STAGE]))
                scene.kubelet.finish(scene.cluster.namespace, pod.metadata.name, message=message)
        return "Complete" in true_conditions(scene.cluster.get().get("status") or {})

    wait_for("the run is complete", complete, on_timeout=lambda: str(scene.cluster.get().get("status")))


def true_conditions(status: Raw) -> set[str]:
    return {condition["type"] for condition in status.get("conditions", ()) if condition["status"] == "True"}


# --- namespaces that go


def test_a_namespace_that_goes_takes_its_run_along(scene: Scene, tmp_path: Path) -> None:
    """Held in Terminating by a finalizer of somebody else's; what is made in it then is refused by the server."""
    server = scene.cluster.server
    scene.operator.kill()
    with (
        server.namespace("ivft-going") as namespace,
        OperatorProcess(scene.cluster, tmp_path, scene.proxy.kubeconfig, NAMESPACES="") as operator,
    ):
        scene.operator, going = operator, Cluster(server, namespace)
        held = {"metadata": {"name": "held", "finalizers": ["example.org/hold"]}}
        going.core.create_namespaced_config_map(namespace, held)
        going.create("doomed")
        scene.kubelet.wait_phase(namespace, "doomed-preflight-0")
        assert operator.remembered(namespace) == 1
        going.core.delete_namespace(namespace)
        with pytest.raises(ApiException, match="being terminated"):
            going.create("late")
        wait_for("the run is gone", lambda: not going.runs.list_namespaced_custom_object(
            GROUP, VERSION, namespace, PLURAL)["items"])  # fmt: skip
        wait_for("its pods are gone", lambda: not going.children()["Pod"])
        scene.assert_quiet("doomed")
        wait_for("it is forgotten", lambda: operator.remembered(namespace) == 0)
        going.core.patch_namespaced_config_map("held", namespace, {"metadata": {"finalizers": None}})


# --- another schema than today's


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A server of its own, whose CRD a test may change."""
    with ApiServer(tmp_path_factory.mktemp("other-schema")) as server:
        yield server


def schema_of(crd: Raw) -> Raw:
    found: Raw = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


@pytest.fixture
def elsewhere(other: ApiServer, tmp_path: Path) -> Iterator[Scene]:
    """As `scene`, on the other server."""
    install_crd(other)
    with other.namespace("ivft") as namespace, FakeKubelet(other.api) as kubelet:
        cluster = Cluster(other, namespace)
        with FaultyProxy(other, tmp_path) as proxy:
            operator = OperatorProcess(cluster, tmp_path, proxy.kubeconfig)
            yield Scene(cluster, kubelet, proxy, operator)
            if operator.started:
                operator.kill()


NEWER = ("runDigest", "failures", "infrastructureFailures", "unscheduledSince", "progressAt", "progressText",
         "microBatchSize", "evaluation", "workers")  # fmt: skip


def test_an_older_crd_prunes_what_it_does_not_know(elsewhere: Scene) -> None:
    """A status that comes back with less than was written is not written again and again."""
    crd = load_crd()
    for field in NEWER:
        del schema_of(crd)["properties"]["status"]["properties"][field]
    install_crd(elsewhere.cluster.server, crd)
    elsewhere.operator.start()
    elsewhere.healthy("run")
    assert not set(NEWER) & set(elsewhere.cluster.get()["status"])
    statuses = [request for request in elsewhere.about("run") if request.path.endswith("/status")]
    # One that is refused for each field; then as with today's CRD: three stages begin, run and end, pod by pod.
    assert len(statuses) <= len(NEWER) + 16
    elsewhere.assert_quiet("run")


def test_a_resource_that_todays_schema_refuses(elsewhere: Scene) -> None:
    """The server forgives what was there before: status tells, and the run can be held, mended or deleted."""
    today = load_crd()
    loose = copy.deepcopy(today)
    del schema_of(loose)["properties"]["spec"]["properties"]["workers"]["minimum"]
    install_crd(elsewhere.cluster.server, loose)
    elsewhere.cluster.create(workers=0)
    install_crd(elsewhere.cluster.server, today)
    wait_for("the schema is today's", lambda: refuses(elsewhere, workers=0))
    elsewhere.operator.start()
    stalled = elsewhere.cluster.wait_condition("Stalled", "InvalidSpec")
    assert stalled["message"] == "spec.workers: found 0, expected at least 1"
    elsewhere.assert_quiet("run")
    elsewhere.cluster.edit({"runPolicy": {"suspend": True}})
    elsewhere.cluster.patch({"metadata": {"labels": {"team": "a"}}})
    elsewhere.cluster.edit({"runPolicy": {"suspend": False}, "workers": 2})
    elsewhere.finish("run")
    elsewhere.assert_quiet("run")


def test_a_resource_too_large_for_its_status_is_explained_by_an_event(scene: Scene) -> None:
    """etcd takes 1.5 MiB; half of it goes into run.yaml here and half into the pods, both of which still fit."""
    data, size = datasets(500, 1400), 850 * 1024
    while not creates(scene, data=data, podTemplate=filler(size)):
        size -= 1024
    told = wait_for("an event tells", lambda: scene.warnings("run"))
    assert "the API server refuses a write" in told[0]
    assert "too large" in told[0]
    assert_backs_off(scene, f"/{PLURAL}/run/status")
    assert len(scene.warnings("run")) == 1
    scene.cluster.edit({"podTemplate": filler(1024)})
    to_the_end(scene)
    scene.assert_quiet("run")


_LONGEST_VALUE = 32_000  # characters of an environment variable; the CRD allows a few more


def filler(size: int) -> Raw:
    """What makes a run and each of its pods larger by so many bytes, and run.yaml not."""
    lengths = [_LONGEST_VALUE] * (size // _LONGEST_VALUE) + [size % _LONGEST_VALUE]
    return {"env": [{"name": f"FILLER_{number}", "value": "x" * length} for number, length in enumerate(lengths)]}


def creates(scene: Scene, **changes: Any) -> bool:
    try:
        scene.cluster.create(**changes)
    except ApiException as error:
        if "too large" not in str(error.body):
            raise
        return False
    return True


def refuses(scene: Scene, **changes: Any) -> bool:
    body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "probe"}, "spec": spec(**changes)}
    try:
        scene.cluster.runs.create_namespaced_custom_object(
            GROUP, VERSION, scene.cluster.namespace, PLURAL, body, dry_run="All"
        )
    except ApiException as error:
        return bool(error.status == 422)
    return False

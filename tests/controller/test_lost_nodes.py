"""Workers on a node that is gone: when they are given up, and when not; nobody else's pod is deleted by force."""

import threading
from typing import Any

import pytest
from controller.builders import NOW, Raw, a_run, at, member, result, text
from controller.fake_server import clock
from controller.simulator import SETTINGS, Operator, World
from internvl_api.constants import KIND
from internvl_api.status import InternVLFineTuneStatus, Progress, StageResult
from internvl_operator.core.observe import Pod, Silence
from internvl_operator.core.policies import lost_nodes, run_policy
from internvl_operator.core.run import Key
from internvl_operator.kube.client import ApiError
from internvl_operator.kube.node_lease import read_renewal
from internvl_operator.polling import node_watch
from internvl_operator.polling.node_watch import NodeWatch

GONE = Silence(16, 10)
KEY = Key("team", "run")


def claim(**more: Any) -> Raw:
    return {"name": "data", "persistentVolumeClaim": {"claimName": "data", **more}}


@pytest.mark.parametrize(
    ("changes", "pod", "silence", "expected"),
    [
        pytest.param({}, {}, GONE, True, id="gone"),
        pytest.param({}, {}, Silence(14.9, 10), False, id="one renewal may be late"),
        pytest.param({}, {}, Silence(40, 30), False, id="a kubelet that renews every 30 s"),
        pytest.param({}, {}, None, False, id="nothing is known"),
        pytest.param({}, {"exit_code": 75}, GONE, False, id="it has ended"),
        pytest.param({}, {"node": None}, GONE, False, id="it has no node"),
        pytest.param({}, {"stage": "publish"}, GONE, False, id="publishing writes elsewhere too"),
        pytest.param({"output": "gs://models/run"}, {}, GONE, True, id="Google's writes have conditions"),
        pytest.param({"output": "az://models/run"}, {}, GONE, True, id="Azure's too"),
        pytest.param({"output": "/mnt/results"}, {}, GONE, False, id="a volume is not fenced"),
        pytest.param({"podTemplate": {"volumes": [claim()]}}, {}, GONE, False, id="a volume that it can write to"),
        pytest.param({"podTemplate": {"volumes": [claim(readOnly=True)]}}, {}, GONE, True, id="a volume that it reads"),
        pytest.param({"podTemplate": {"volumes": [{"name": "tmp", "emptyDir": {}}]}}, {}, GONE, True, id="own disk"),
        pytest.param({"podTemplate": {"volumes": [{"name": "x", "ephemeral": {}}]}}, {}, GONE, False, id="other kinds"),
        pytest.param({"runPolicy": {"suspend": True}}, {}, GONE, False, id="nothing takes over a suspended run"),
        pytest.param({"workers": 0}, {}, GONE, False, id="the spec is invalid"),
    ],
)
def test_which_pods_may_be_deleted_by_force(changes: Raw, pod: Raw, silence: Silence | None, expected: bool) -> None:
    worker = member(1, **({"node": "gpu-1"} | pod))
    silences = {worker.uid: silence} if silence else {}
    assert lost_nodes.lost(a_run(**changes), [worker], silences) == ({worker.uid} if expected else frozenset())


def failed(rank: int, reason: str) -> Pod:
    words = StageResult(stage="train", outcome="failed", reason=reason)
    return member(rank, node="gpu-0", phase="Failed", exit_code=1, result=words)


@pytest.mark.parametrize(
    ("first", "moved", "watched"),
    [
        pytest.param(member(0, node="gpu-0"), 4, [], id="training goes on"),
        pytest.param(member(0, node="gpu-0"), 6, [0, 1], id="no step for six seconds"),
        pytest.param(member(0, node="gpu-0"), None, [], id="nothing reported yet"),
        pytest.param(failed(0, "PeerLost"), 1, [1], id="a peer lost its peer"),
        pytest.param(failed(0, "RendezvousTimeout"), None, [1], id="a peer met nobody"),
        pytest.param(failed(0, "ValueError"), 1, [], id="a peer failed by itself"),
    ],
)
def test_which_nodes_are_watched(first: Pod, moved: int | None, watched: list[int]) -> None:
    progress_at = None if moved is None else text(at(-moved))
    status = InternVLFineTuneStatus(progress_at=progress_at)
    pods = [first, member(1, node="gpu-1")]
    assert [pod.rank for pod in lost_nodes.suspects(pods, [], status, NOW)] == watched


# --- stories


class Watched(World):
    """A run that trains on two nodes, with an operator that may read their Leases."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**changes)
        self.operator = Operator(self.server, SETTINGS.model_copy(update={"node_leases": True}))
        self.pass_stage("preflight")
        self.train()

    def train(self) -> None:
        self.run("train")
        for rank, name in enumerate(self.pods("train")):
            self.server.change("Pod", name, lambda raw, rank=rank: raw["spec"].setdefault("nodeName", f"gpu-{rank}"))
        self.server.answers["run-train-0"] = Progress(stage="train", step=self.server.now.second + 1)
        self.operator.settle()

    def power_off(self, node: str) -> None:
        """The peers hang, and after a while the silence of node and pod is long enough."""
        self.later(11)
        self.server.silent[node] = 16
        self.operator.settle()

    def avoided(self, pod: str) -> list[str]:
        affinity = self.server.pods[pod]["spec"].get("affinity", {}).get("nodeAffinity", {})
        ((terms, *_),) = [list(rule["nodeSelectorTerms"]) for key, rule in affinity.items() if "required" in key] or [
            [{}]
        ]
        return [node for field in terms.get("matchFields", ()) for node in field["values"]]


def test_a_group_that_hangs_for_a_lost_node_starts_again_without_it() -> None:
    world = Watched()
    world.power_off("gpu-1")
    assert world.status["attempt"] == 2
    (train,) = [stage for stage in world.status["stages"] if stage["name"] == "train"]
    assert train["reason"] == "NodeLost"
    assert "worker 1 (pod run-train-1) is lost: the kubelet of node gpu-1" in train["message"]
    assert "run-train-1" not in world.server.pods, "deleted by force"
    ends = world.server.pods["run-train-0"]["metadata"]["deletionTimestamp"]
    assert ends == text(at(11 + run_policy.SHORT_GRACE)), (
        "its peer gets a short grace period, not the usual two minutes"
    )
    world.server.remove("Pod", "run-train-0")
    world.operator.settle()
    assert world.pods("train") == ["run-train-0", "run-train-1"]
    assert {tuple(world.avoided(pod)) for pod in world.pods("train")} == {("gpu-1",)}
    assert world.status["nodeFailures"] == {"gpu-1": 1}
    assert world.status["restarts"] == {"user": 0, "infrastructure": 1}


def test_an_attempt_that_its_peers_ended_does_not_wait_for_the_pod_on_the_lost_node() -> None:
    world = Watched()
    world.end("train", 1, result("train", "failed", "PeerLost", message="closed"), ranks=(0,))
    world.later(6)
    assert world.status["attempt"] == 2
    assert "deletionTimestamp" in world.server.pods["run-train-1"]["metadata"]
    world.later(10)
    assert "run-train-1" in world.server.pods, "it may save its state"
    world.server.silent["gpu-1"] = 16
    world.operator.settle()
    assert world.server.attempts("train") == {"2"}
    assert world.avoided("run-train-0") == ["gpu-1"]


def test_the_attempt_after_the_next_may_use_the_node_again() -> None:
    world = Watched()
    world.power_off("gpu-1")
    world.server.silent.clear()
    world.server.remove("Pod", "run-train-0")
    world.operator.settle()
    world.train()
    world.end("train", 75)
    world.collect()
    world.later(60)
    assert world.avoided("run-train-0") == []


def test_a_worker_that_answers_is_not_given_up() -> None:
    world = Watched()
    world.later(11)
    world.server.silent["gpu-1"] = 9
    world.operator.settle()
    world.later(600)
    assert world.status["attempt"] == 1


def test_a_suspended_run_waits_for_its_pods() -> None:
    world = Watched()
    world.server.change(KIND, "run", lambda raw: raw["spec"].update(runPolicy={"suspend": True}))
    world.operator.settle()
    world.server.silent["gpu-1"] = 100
    clock(world.server, 5)
    world.operator.settle()
    assert "run-train-1" in world.server.pods


# --- what the watch sees


class Nodes:
    """Two nodes with a pod each, and a clock."""

    def __init__(self) -> None:
        self.now, self.renewals, self.alive = 0.0, dict[str, tuple[str, float] | None](), set[str]()
        self.pods = [member(rank, node=f"gpu-{rank}") for rank in (0, 1)]
        self.changed: list[Key] = []
        self.watch = NodeWatch(
            self.changed.append,
            lambda node: self.renewals.get(node),
            threads=2,
            answers=lambda pod: str(pod.node) in self.alive,
            clock=lambda: self.now,
        )
        self.watch.follow(KEY, self.pods)

    def look(self, seconds: float, *renewing: str) -> dict[str, float]:
        """Look every two seconds; the silence of each node in the end."""
        for _ in range(round(seconds / 2)):
            self.now += 2
            for node in renewing:
                self.renewals[node] = str(self.now // 10), 10.0
            self.watch.look()
        silences = self.watch.silences(KEY)
        return {str(pod.node): silences[pod.uid].seconds for pod in self.pods if pod.uid in silences}


def test_a_node_that_renews_its_lease_is_not_silent_although_its_pod_is() -> None:
    nodes = Nodes()
    assert max(nodes.look(60, "gpu-0", "gpu-1").values()) < 10
    assert nodes.changed == []


def test_a_node_that_stops_renewing_with_its_pod_is_silent_and_told_once() -> None:
    nodes = Nodes()
    nodes.look(20, "gpu-0", "gpu-1")
    silence = nodes.look(30, "gpu-0")
    assert silence["gpu-0"] < 10 < 15 <= silence["gpu-1"]
    assert nodes.changed == [KEY]


def test_a_pod_that_answers_is_not_silent_although_its_node_is() -> None:
    nodes = Nodes()
    nodes.alive.add("gpu-1")
    nodes.look(20, "gpu-0", "gpu-1")
    assert nodes.look(60, "gpu-0")["gpu-1"] < 10
    nodes.alive.clear()
    assert nodes.look(20, "gpu-0")["gpu-1"] > 15


def test_a_lease_that_cannot_be_read_is_no_evidence() -> None:
    nodes = Nodes()
    nodes.look(10, "gpu-0", "gpu-1")
    before = nodes.look(0)
    nodes.renewals.clear()
    assert nodes.look(120) == before
    assert nodes.changed == []


def test_the_watch_goes_on_after_a_look_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_watch, "_EVERY", 0.001)
    looks, again = list[str](), threading.Event()

    def renewal(node: str) -> None:
        looks.append(node)
        if len(looks) == 1:
            raise RuntimeError("can't start new thread")
        again.set()

    watch = NodeWatch(lambda key: None, renewal, threads=1)
    watch.follow(KEY, [member(0, node="gpu-0")])
    watch.start()
    assert again.wait(30)
    watch.stop()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"renewTime": "2026-01-31T12:00:00.5Z", "leaseDurationSeconds": 40}, ("2026-01-31T12:00:00.5Z", 10.0)),
        ({"renewTime": "x", "leaseDurationSeconds": 120}, ("x", 30.0)),
        ({"renewTime": "x", "leaseDurationSeconds": 1}, ("x", 10.0)),
        ({"renewTime": "x", "leaseDurationSeconds": 10**30}, ("x", 900.0)),
        ({"renewTime": "x"}, ("x", 10.0)),
        ({"renewTime": 5}, None),
        (None, None),
    ],
)
def test_a_lease_is_read_with_its_bounds(spec: Any, expected: tuple[str, float] | None) -> None:
    class Api:
        def lease(self, *request: object) -> Raw:
            return {"spec": spec}

    assert read_renewal(Api(), "gpu-1") == expected  # type: ignore[arg-type]


def test_a_refused_lease_is_no_evidence() -> None:
    class Api:
        def lease(self, *request: object) -> Raw:
            raise ApiError(403, "Forbidden", "leases is forbidden")

    assert read_renewal(Api(), "gpu-1") is None  # type: ignore[arg-type]

"""A run on a real API server is told once undisturbed; then once for each write, after which the operator is killed.

The operator gets SIGKILL when the API server has done the write and before the answer is passed on. To die with the
answer just read is the same: what the process knew is gone, and the server has what it has. And to die before write
k + 1 is to die after write k. Nodes are played by hand, one step at a time, so that every telling makes the same
writes in the same order.
"""

import copy
import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from controller.builders import Raw, result
from controller.faulty_proxy import AnswerLost, Fault, FaultyProxy, Request
from controller.operator_process import Cluster, OperatorProcess
from controller.witness import Witness
from internvl_api.constants import KIND
from ivft_cluster.api_server import ApiServer
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.shell import HarnessError, tail, wait_for
from kubernetes.client.exceptions import ApiException

pytestmark = pytest.mark.integration

SPEC: dict[str, Any] = {"scheduling": {"gang": "volcano"}, "runPolicy": {"ttlSecondsAfterFinished": 0}}
# As the chart has it, a restarted container keeps its pod's name: the Lease that the dead one left, here for ten
# minutes, does not hold it up.
SETTINGS = {
    "GANG_SCHEDULERS": "volcano",
    "NETWORK_POLICY_PEERS": "[]",
    "LEADER_ELECTION": "true",
    "LEASE_IDENTITY": "operator-0",
    "LEASE_SECONDS": "600",
}
AT_ONCE = 2 * (os.cpu_count() or 1)


class Telling:
    """The run in a namespace of its own; `kill_after`: number of the write after which the operator is killed, once."""

    def __init__(self, cluster: Cluster, folder: Path, proxy: FaultyProxy, kill_after: int | None) -> None:
        self.cluster, self.proxy, self.kill_after = cluster, proxy, kill_after
        self.witness = Witness(cluster)
        self.operator = OperatorProcess(
            cluster, folder, proxy.kubeconfig, LEASE_NAMESPACE=cluster.namespace, **SETTINGS
        )
        self.writes: list[str] = []
        self._kubelet = FakeKubelet(cluster.server.api)  # not opened: it acts only when it is told to
        self._down, self._lives = True, 0
        proxy.fault = self._count

    # --- the story

    def tell(self) -> None:
        """Preflight; training, which loses a worker; publishing; the run and all that was made for it goes."""
        self.cluster.create(**SPEC)
        self._until("preflight: 0 of 1 workers run")
        self._run("run-preflight-0")
        self._until("preflight: 1 of 1 workers run")
        self._succeed("run-preflight-0", "preflight")
        self._train("")
        self._kubelet.evict(self.cluster.namespace, "run-train-1", "NodeLost", "Node fake-1 is unreachable")
        self._until("train: waiting for 1 pods of the last attempt to terminate")  # the other one saves its state
        self.cluster.core.delete_namespaced_pod("run-train-0", self.cluster.namespace, grace_period_seconds=0)
        self._train(", attempt 2")
        self._succeed("run-train-0", "train")
        self._until("train: 1 of 2 workers run")
        self._succeed("run-train-1", "train")
        self._until("publish: 0 of 1 workers run")
        self._run("run-publish-0")
        self._until("publish: 1 of 1 workers run")
        self._succeed("run-publish-0", "publish")
        self._wait(
            "the run and its children are gone", lambda: not self.witness.there and self._lives == self._expected()
        )
        wait_for("the operator looks on", self.operator.ready)

    def _expected(self) -> int:
        """Lives of the operator; a run with fewer status writes than the undisturbed one may end before its kill."""
        return 2 if self.kill_after is not None and len(self.writes) >= self.kill_after else 1

    def _train(self, attempt: str) -> None:
        self._until(f"train: 0 of 2 workers run{attempt}")
        self._run("run-train-0")
        self._until(f"train: 1 of 2 workers run{attempt}")
        self._run("run-train-1")
        self._until(f"train: 2 of 2 workers run{attempt}")

    # --- what nodes do

    def _run(self, pod: str) -> None:
        self._wait(f"pod {pod} is made", lambda: ("Pod", pod) in self.witness.there)
        self._kubelet.start(self.cluster.namespace, pod)

    def _succeed(self, pod: str, stage: str) -> None:
        self._kubelet.finish(self.cluster.namespace, pod, message=json.dumps(result(stage)))

    # --- waiting, with an operator that is started again when it is down

    def _until(self, words: str) -> None:
        """The status says so."""

        def holds() -> bool:
            conditions = self._status().get("conditions", ())
            return any(each["type"] == "Ready" and each["message"].startswith(words) for each in conditions)

        self._wait(words, holds)

    def _status(self) -> Raw:
        status: Raw = self.witness.there.get((KIND, "run"), {}).get("status", {})
        return status

    def _wait(self, what: str, holds: Callable[[], bool]) -> None:
        def look() -> bool:
            if self._down:
                self._down = False
                self._lives += 1
                self.operator.launch()
            return holds()

        def why() -> str:
            left = ", ".join(f"{kind} {name}" for kind, name in self.witness.there)
            return f"there are {left or 'no objects'}; {self._status()}\n{tail(self.operator.log)}"

        self.witness.until(what, look, why=why)

    def _count(self, request: Request) -> Fault:
        """Kubernetes Events are not counted (a thread of their own sends them, none decides anything), nor renewals."""
        counted = request.method != "GET" and "/events" not in request.path
        if not counted or (request.method == "PUT" and "/leases/" in request.path):
            return None
        _, _, written = request.path.partition(f"/namespaces/{self.cluster.namespace}/")
        self.writes.append(f"{request.method} {written}")
        return AnswerLost(self._kill) if len(self.writes) == self.kill_after else None

    def _kill(self) -> None:
        self.operator.kill()
        with self.witness.changed:
            self._down = True
            self.witness.changed.notify_all()


def tell(server: ApiServer, folder: Path, kill_after: int | None = None) -> Telling:
    """A telling that has been told."""
    folder.mkdir()
    with ExitStack() as stack:
        cluster = Cluster(server, stack.enter_context(server.namespace("crash")))
        proxy = stack.enter_context(FaultyProxy(server, folder))
        telling = Telling(cluster, folder, proxy, kill_after)
        stack.enter_context(telling.witness)
        stack.push(telling.operator)
        telling.tell()
    return telling


def to_children(writes: list[str]) -> list[str]:
    """The writes without those of status: how many of these there are depends on how the watch delivers changes."""
    return [write for write in writes if not write.endswith("/status")]


def kinds(writes: list[str]) -> Counter[str]:
    """How many writes of each kind, such as "PATCH pods" or "PATCH internvlfinetunes/status"."""
    return Counter(re.sub(r"/[^/]+", "", write, count=1) for write in writes)


@pytest.fixture(scope="module")
def undisturbed(served: ApiServer, volcano: Any, tmp_path_factory: pytest.TempPathFactory) -> Telling:
    return tell(served, tmp_path_factory.mktemp("undisturbed") / "run")


def test_the_undisturbed_run_makes_every_kind_of_write(undisturbed: Telling) -> None:
    made = kinds(undisturbed.writes)
    # A pod's place on a node and its start are one change or two, as the watch delivers them.
    assert 15 <= made.pop("PATCH internvlfinetunes/status") <= 18
    assert made == {
        "POST leases": 1,
        "PATCH configmaps": 1,
        "PATCH services": 1,
        "PATCH networkpolicies": 1,
        "PATCH podgroups": 3,
        "PATCH pods": 6,
        "DELETE pods": 2,
        "DELETE internvlfinetunes": 1,
    }
    end = undisturbed.witness.in_the_end()
    assert {name: found["made"] for name, found in end.items()} == {
        f"{KIND} run": 1,
        "ConfigMap ivft-run": 1,
        "Service ivft-run": 1,
        "NetworkPolicy ivft-run": 1,
        "PodGroup ivft-run-preflight": 1,
        "PodGroup ivft-run-train": 1,
        "PodGroup ivft-run-publish": 1,
        "Pod run-preflight-0": 1,
        "Pod run-train-0": 2,
        "Pod run-train-1": 2,
        "Pod run-publish-0": 1,
    }
    status = end[f"{KIND} run"]["status"]
    assert (status["phase"], status["attempt"]) == ("Succeeded", 2)
    assert status["restarts"] == {"user": 0, "infrastructure": 1}


@pytest.mark.parametrize(
    ("name", "path", "other"),
    [
        pytest.param("Pod run-train-0", ("made",), 3, id="a-pod-made-once-more"),
        pytest.param("Pod run-train-0", ("metadata", "labels", "internvl.dev/attempt"), "3", id="another-attempt"),
        pytest.param(f"{KIND} run", ("status", "restarts", "infrastructure"), 2, id="an-end-counted-twice"),
        pytest.param(f"{KIND} run", ("status", "phase"), "Failed", id="another-end"),
        pytest.param(f"{KIND} run", ("status", "conditions", 0, "reason"), "Because", id="another-reason"),
        pytest.param("ConfigMap ivft-run", ("data", "run.yaml"), "", id="another-run-yaml"),
    ],
)
def test_what_may_not_differ_is_seen(undisturbed: Telling, name: str, path: tuple[Any, ...], other: Any) -> None:
    wanted = undisturbed.witness.in_the_end()
    found = copy.deepcopy(wanted)
    *steps, last = path
    place: Any = found[name]
    for step in steps:
        place = place[step]
    assert place[last] != other
    place[last] = other
    assert _difference(wanted, found)
    assert not _difference(wanted, undisturbed.witness.in_the_end())


def test_a_kill_after_any_write_changes_nothing_in_the_end(
    undisturbed: Telling, served: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def difference(kill_after: int) -> str:
        try:
            told = tell(served, tmp_path / str(kill_after), kill_after)
        except (AssertionError, HarnessError, ApiException) as error:
            return str(error)
        until_then = to_children(told.writes[:kill_after])
        return _difference(to_children(undisturbed.writes)[: len(until_then)], until_then) or _difference(
            undisturbed.witness.in_the_end(), told.witness.in_the_end()
        )

    total = len(undisturbed.writes)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(difference, range(1, total + 1)))
    wrong = [f"killed after write {k}, {undisturbed.writes[k - 1]}:\n{text}" for k, text in enumerate(found, 1) if text]
    with capsys.disabled():
        print(f"\nkilled after each of the {total} writes of a run: {total - len(wrong)} runs of {total} end the same")
    assert not wrong, "\n".join(wrong)


def _difference(wanted: Any, found: Any) -> str:
    """Lines of JSON that differ; empty when all is the same."""
    lines = [json.dumps(each, indent=1, sort_keys=True).splitlines() for each in (wanted, found)]
    return "\n".join(difflib.unified_diff(*lines, "undisturbed", "killed", n=3, lineterm=""))

"""`kubectl ivft` as a process against a real API server, with the rights of a user who has some, or none."""

import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from controller.builders import result
from controller.operator_process import Cluster, OperatorProcess
from internvl_api.constants import GROUP, PLURAL, VERSION
from ivft_cluster.api_server import ApiServer
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.shell import wait_for

pytestmark = pytest.mark.integration

Ivft = Callable[..., subprocess.CompletedProcess[str]]


def call(server: ApiServer, *words: str, user: str = "admin", **env: str) -> subprocess.CompletedProcess[str]:
    kubeconfig = server.control_plane.pki / f"{user}.kubeconfig"
    return subprocess.run(
        [sys.executable, "-m", "internvl_operator.kubectl_ivft", *words],
        env={**os.environ, "KUBECONFIG": str(kubeconfig), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def ivft(cluster_of_test: Cluster) -> Ivft:
    """The command, in the test's namespace."""

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return call(cluster_of_test.server, "-n", cluster_of_test.namespace, *words, **more)

    return run


def test_a_run_is_told_suspended_and_resumed(
    cluster_of_test: Cluster, kubelet: FakeKubelet, operator: OperatorProcess, ivft: Ivft
) -> None:
    cluster = cluster_of_test
    cluster.create()
    kubelet.wait_phase(cluster.namespace, "run-preflight-0")
    kubelet.finish(cluster.namespace, "run-preflight-0", message=json.dumps(result("preflight")))
    cluster.wait("it trains", lambda status: (status["stage"], status["phase"]) == ("train", "Running"))

    assert ivft("list").stdout.splitlines()[1].split()[:3] == ["run", "Running", "train"]
    assert cluster.namespace in ivft("list", "-A").stdout
    told = ivft("status", "run").stdout
    assert "✓   preflight" in told
    assert "train: 2 of 2 workers run" in told
    assert ivft("why", "run").stdout.splitlines()[0] == "run runs"

    assert "suspended" in ivft("suspend", "run").stdout
    cluster.wait_condition("Suspended")
    assert f"next: resume it: kubectl ivft -n {cluster.namespace} resume run" in ivft("why", "run").stdout
    assert "already" in ivft("suspend", "run").stdout
    generation = cluster.get()["metadata"]["generation"]
    assert ivft("resume", "run").returncode == 0
    cluster.wait("it trains again", lambda status: (status["attempt"], status["phase"]) == (2, "Running"))
    assert cluster.get()["metadata"]["generation"] == generation + 1


def test_events_cost_and_differences_of_a_run(
    cluster_of_test: Cluster, kubelet: FakeKubelet, operator: OperatorProcess, ivft: Ivft
) -> None:
    cluster = cluster_of_test
    cluster.create()
    cluster.create("other", workers=3, training={"globalBatchSize": 24})
    kubelet.wait_phase(cluster.namespace, "run-preflight-0")
    kubelet.finish(cluster.namespace, "run-preflight-0", message=json.dumps(result("preflight")))
    cluster.wait("it trains", lambda status: (status["stage"], status["phase"]) == ("train", "Running"))
    wait_for("its events", lambda: "ivft/run   StageStarted: train: attempt 1 started" in ivft("events", "run").stdout)
    assert "ivft/other" not in ivft("events", "run").stdout
    cost = [line.split() for line in ivft("cost", "run", "--price", "2.5").stdout.splitlines()]
    assert [line[0] for line in cost] == ["STAGE", "preflight", "train", "run"]
    assert cost[1][-1] == "Succeeded"
    differences = [line.split() for line in ivft("diff", "run", "other").stdout.splitlines()]
    assert ["workers", "2", "3"] in differences
    completed = call(cluster.server, "__complete", "-n", cluster.namespace, "status", "o")
    assert completed.stdout == "other\n:4\n"


def test_logs_come_through_the_api_server(
    cluster_of_test: Cluster, kubelet: FakeKubelet, operator: OperatorProcess, ivft: Ivft
) -> None:
    cluster = cluster_of_test
    cluster.create()
    kubelet.wait_phase(cluster.namespace, "run-preflight-0")
    with _kubelet_logs(cluster.server, kubelet, "first\nthe last, without an end of line") as asked:
        told = ivft("logs", "run", "--tail", "7")
    assert told.stdout == "first\nthe last, without an end of line\n"
    assert "run-preflight-0: preflight, attempt 1, rank 0" in told.stderr
    assert f"/containerLogs/{cluster.namespace}/run-preflight-0/trainer" in asked[0]
    assert "tailLines=7" in asked[0]
    missing = ivft("logs", "run", "--rank", "1")
    assert missing.returncode == 1
    assert "no pod of any stage, rank 1; existing pods (stage, rank): preflight 0" in missing.stderr


@pytest.mark.parametrize(
    ("words", "user", "said"),
    [
        pytest.param(["status", "coco-lora"], "admin", "did you mean 'coco-lara'?", id="a-typo"),
        pytest.param(["why", "zebra"], "admin", "no run 'zebra' in namespace", id="another-name"),
        pytest.param(["list"], "front-proxy", "you may not list runs in this cluster", id="no-rights"),
        pytest.param(["list", "-A"], "front-proxy", "omit -A", id="no-rights-everywhere"),
        pytest.param(["suspend", "coco-lara"], "front-proxy", "you may not read the run", id="no-right-to-change"),
        pytest.param(["report", "coco-lara"], "admin", "no report yet: it is pending", id="no-report"),
        pytest.param(["list", "--context", "moon"], "admin", "no cluster configured:", id="no-such-context"),
    ],
)
def test_an_error_is_a_word_and_the_next_step(
    cluster_of_test: Cluster, ivft: Ivft, words: list[str], user: str, said: str
) -> None:
    cluster_of_test.create("coco-lara")
    told = ivft(*words, user=user)
    assert told.returncode == 1
    assert said in told.stderr
    assert "Traceback" not in told.stderr


def test_an_empty_namespace_is_said_to_be_empty(ivft: Ivft) -> None:
    told = ivft("list")
    assert (told.returncode, told.stdout) == (0, "")
    assert "no runs in namespace" in told.stderr


def test_a_cluster_without_the_crd(tmp_path: Path) -> None:
    with ApiServer(tmp_path, controllers=()) as bare:
        for words in (["list"], ["status", "run"]):
            told = call(bare, *words)
            assert told.returncode == 1
            assert "its CRD is not installed" in told.stderr


def test_a_report_is_fetched_whole_with_the_readers_keys(
    cluster_of_test: Cluster, s3_server: Any, ivft: Ivft, tmp_path: Path
) -> None:
    s3 = s3_server.client()
    s3.create_bucket(Bucket="reports")
    s3.put_object(Bucket="reports", Key="run/report.html", Body=b"<h1>fine</h1>")
    cluster_of_test.create()
    _publish(cluster_of_test, "s3://reports/run/report.html")
    assert ivft("report", "run").stdout == "s3://reports/run/report.html\n"
    keys = s3_server.env
    target = tmp_path / "report.html"
    assert ivft("report", "run", "--out", str(target), **keys).returncode == 0
    assert target.read_bytes() == b"<h1>fine</h1>"
    _publish(cluster_of_test, "s3://reports/run/elsewhere.html")
    lost = ivft("report", "run", "--out", str(tmp_path / "lost.html"), **keys)
    assert lost.returncode == 1
    assert "cannot download s3://reports/run/elsewhere.html" in lost.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def _publish(cluster: Cluster, uri: str) -> None:
    """A run's end, without an operator."""
    change = {"status": {"observedGeneration": 1, "phase": "Succeeded", "artifacts": {"report": uri}}}
    cluster.runs.patch_namespaced_custom_object_status(GROUP, VERSION, cluster.namespace, PLURAL, "run", change)


@contextmanager
def _kubelet_logs(server: ApiServer, kubelet: FakeKubelet, log: str) -> Iterator[list[str]]:
    """The log endpoint of every fake node, which answers with `log`; the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(log.encode())

        def log_message(self, *_: object) -> None:
            pass

    endpoint = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    pki = server.control_plane.pki
    tls.load_cert_chain(pki / "apiserver.crt", pki / "apiserver.key")  # of the authority that the API server trusts
    endpoint.socket = tls.wrap_socket(endpoint.socket, server_side=True)
    threading.Thread(target=endpoint.serve_forever, daemon=True).start()
    place = {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": endpoint.server_port}},
    }
    for node in kubelet.nodes:
        server.core.patch_node_status(node, {"status": place})
    try:
        yield asked
    finally:
        endpoint.shutdown()
        endpoint.server_close()

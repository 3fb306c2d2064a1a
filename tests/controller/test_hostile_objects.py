"""One tenant's objects and pods: they cost that tenant's runs, never the operator or another tenant.

The CRD of these tests lets any spec in, as an older or changed one may. Each test prints how long another tenant waited
for a first pod meanwhile, and the operator's memory, which the limit of the chart bounds.
"""

import contextlib
import copy
import itertools
import json
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from controller.builders import result, spec
from controller.operator_process import Cluster, OperatorProcess
from internvl_api.constants import API_VERSION, GROUP, KIND, METRICS_PORT, PLURAL, VERSION
from internvl_api.quantity import parse_bytes
from ivft_cluster import helm
from ivft_cluster.api_server import ApiServer
from ivft_cluster.crds import install_crd, load_crd
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.shell import wait_for
from kubernetes.client.exceptions import ApiException

pytestmark = pytest.mark.integration
_names = (f"healthy-{number}" for number in itertools.count())
_VALUES = yaml.safe_load((helm.CHART / "values.yaml").read_text(encoding="utf-8"))
MEMORY_LIMIT = parse_bytes(_VALUES["resources"]["limits"]["memory"])


@pytest.fixture(scope="module")
def lax(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A server whose CRD takes any spec."""
    with ApiServer(tmp_path_factory.mktemp("lax")) as server:
        crd = load_crd()
        version = crd["spec"]["versions"][0]
        version.pop("selectableFields")
        version["subresources"].pop("scale")
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"]["spec"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        schema.pop("x-kubernetes-validations", None)
        install_crd(server, crd)
        yield server


class Tenants:
    """A hostile and a healthy tenant of one operator."""

    def __init__(self, server: ApiServer, hostile: str, healthy: str, folder: Path) -> None:
        self.hostile, self.healthy = Cluster(server, hostile), Cluster(server, healthy)
        self.operator = OperatorProcess(self.healthy, folder, NAMESPACES="", LOG_LEVEL="WARNING")
        self.measured: list[str] = []
        self._pki = server.control_plane.pki
        self._url = server.url

    def create_raw(self, body: str, name: str = "hostile") -> None:
        """Create a run in the hostile tenant's namespace from JSON text: Python cannot encode all of it."""
        answer = requests.post(
            f"{self._url}/apis/{GROUP}/{VERSION}/namespaces/{self.hostile.namespace}/{PLURAL}",
            data=json.dumps({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}})[:-1]
            + f', "spec": {body}}}',
            headers={"Content-Type": "application/json"},
            cert=(str(self._pki / "admin.crt"), str(self._pki / "admin.key")),
            verify=str(self._pki / "ca.crt"),
            timeout=30,
        )
        assert answer.status_code == 201, answer.text[:500]

    def assert_healthy(self) -> None:
        """The healthy tenant's next run gets its first pod from the same process, which has memory left."""
        pid, name = self.operator.pid, next(_names)
        begun = time.monotonic()
        self.healthy.create(name)
        wait_for("its first pod", lambda: f"{name}-preflight-0" in self.healthy.children()["Pod"], timeout=60)
        seconds, memory = time.monotonic() - begun, self.memory()
        self.measured.append(f"first pod of another tenant after {seconds:.2f} s, operator {memory / 1e6:.0f} MB")
        assert self.operator.ready()
        assert self.operator.pid == pid
        assert memory < MEMORY_LIMIT

    def memory(self) -> int:
        """Resident bytes of the operator's process."""
        return int(psutil.Process(self.operator.pid).memory_info().rss)


@pytest.fixture(scope="module")
def kubelet(lax: ApiServer) -> Iterator[FakeKubelet]:
    """One for all tests: the pods of an earlier one may still be there."""
    with FakeKubelet(lax.api) as running:
        yield running


@pytest.fixture
def tenants(
    lax: ApiServer, kubelet: FakeKubelet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Tenants]:
    with lax.namespace("ivft-hostile") as hostile, lax.namespace("ivft-healthy") as healthy:
        made = Tenants(lax, hostile, healthy, tmp_path)
        with made.operator:
            yield made
        with capsys.disabled():
            print("", *made.measured, sep="\n  ")


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def with_deepspeed(levels: int) -> str:
    marked = copy.deepcopy(spec(training={"deepspeed": "MARK"}))
    return json.dumps(marked).replace('"MARK"', nested(levels))


@pytest.fixture
def deep_decoder() -> Iterator[None]:
    """Let the test itself read what it made."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(12_000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("deep_decoder")
@pytest.mark.parametrize("levels", [40, 300, 990, 4000])
def test_nesting_stalls_its_own_run(tenants: Tenants, levels: int) -> None:
    tenants.create_raw(with_deepspeed(levels))
    stalled = tenants.hostile.wait_condition("Stalled", "InvalidSpec", name="hostile")
    assert stalled["message"].startswith("spec.training.deepspeed.a.a")
    assert "nested deeper than 32 levels" in stalled["message"]
    tenants.assert_healthy()
    tenants.operator.kill()
    tenants.operator.start()  # it lists the object now, as a standby does that takes over
    tenants.assert_healthy()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("output", "s3://out/" + "/" * 200_000 + "x"),
        ("output", "s3://out/" + "x/" * 100_000),
        ("recipe", "-" * 200_000),
        ("workers", "9" * 200_000),
    ],
)
def test_long_texts_stall_their_own_run(tenants: Tenants, field: str, value: str) -> None:
    tenants.create_raw(json.dumps(spec(**{field: value})))
    stalled = tenants.hostile.wait_condition("Stalled", "InvalidSpec", name="hostile")
    assert stalled["message"] == f"spec.{field}: found a text of {len(value):,} characters, expected at most 32,768"
    tenants.assert_healthy()


def test_edits_of_a_large_run_do_not_add_up_in_memory(tenants: Tenants) -> None:
    far = f"s3://data/{'x' * 900}.jsonl"
    data = {"train": {f"set-{number:04d}": {"annotation": far} for number in range(900)}}
    tenants.hostile.create("large", data=data)
    tenants.hostile.wait("it is read", lambda status: status.get("phase"), name="large")

    def edit(number: int) -> None:
        tenants.hostile.edit({"training": {"seed": number}}, name="large")
        generation = tenants.hostile.get("large")["metadata"]["generation"]
        tenants.hostile.wait("it is read", lambda status: status["observedGeneration"] == generation, name="large")

    for number in range(10):
        edit(number)
    before = tenants.memory()
    for number in range(10, 50):
        edit(number)
    assert tenants.memory() - before < 60e6  # kept for each edit, it would be 110 MB
    tenants.assert_healthy()


# --- what pods say


class Pod:
    """The port of a pod for /progress, on the address that the fake kubelet gave it."""

    def __init__(self, address: str, answer: Callable[[Any], None]) -> None:
        outer, self.asked = self, threading.Semaphore(0)

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.rfile.readline()
                outer.asked.release()
                with contextlib.suppress(OSError):
                    answer(self.wfile)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address, daemon_threads = True, True

        self._server = Server((address, METRICS_PORT), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def saying(body: bytes) -> Callable[[Any], None]:
    return lambda sink: sink.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)


def dripping(closed: threading.Event) -> Callable[[Any], None]:
    """One byte a second, until the operator hangs up or the test ends."""

    def answer(sink: Any) -> None:
        for byte in itertools.chain(b"HTTP/1.0 200 OK\r\n\r\n", itertools.repeat(ord(" "))):
            sink.write(bytes([byte]))
            if closed.wait(1):
                return

    return answer


@pytest.fixture
def serve(kubelet: FakeKubelet) -> Iterator[Callable[..., Pod]]:
    """Serves the port of a run's preflight pod once it runs."""
    pods: list[Pod] = []

    def start(namespace: str, run: str, answer: Callable[[Any], None]) -> Pod:
        address = kubelet.wait_phase(namespace, f"{run}-preflight-0", timeout=60).status.pod_ip
        pods.append(Pod(address, answer))
        return pods[-1]

    yield start
    for pod in pods:
        pod.close()


def test_pods_that_answer_slowly_hold_up_nobody_else(tenants: Tenants, serve: Callable[..., Pod]) -> None:
    closed = threading.Event()
    for number in range(8):
        tenants.hostile.create(f"slow-{number}")
    slow = [serve(tenants.hostile.namespace, f"slow-{number}", dripping(closed)) for number in range(8)]
    for pod in slow:
        assert pod.asked.acquire(timeout=60)
    tenants.healthy.create("quick")
    quick = serve(tenants.healthy.namespace, "quick", saying(b'{"stage": "preflight", "detail": "row 7"}'))
    begun = time.monotonic()
    for _ in range(20):
        assert quick.asked.acquire(timeout=60)
    tenants.measured.append(f"another tenant's pod was asked 20 times in {time.monotonic() - begun:.1f} s")
    told = tenants.healthy.wait("its progress is told", lambda s: "row 7" in str(s.get("progress")), "quick")
    assert told["phase"] == "Running"
    tenants.assert_healthy()
    closed.set()


def assert_printable(status: dict[str, Any]) -> None:
    written = json.dumps(status)
    assert "\\u001b" not in written
    assert "\\u0000" not in written


ANSWERS = [
    b'{"stage": "preflight", "step": 1e999, "loss": NaN, "etaSeconds": -Infinity}',
    b'{"stage": "preflight", "step": 99999999999999999999999999, "totalSteps": -1}',
    b'{"stage": "preflight", "detail": "' + b"\\u001b[2J[bold]x[/nope]\\ud83d\\u0000" * 100 + b'"}',
    b'{"detail": ' + b"[" * 60_000,
    b'{"step": ' + b"9" * 60_000 + b"}",
    b"\xff\xfe" * 30_000,
    b"x" * 10_000_000,
]


@pytest.mark.parametrize("body", ANSWERS, ids=["infinite", "int64", "escapes", "nested", "digits", "binary", "endless"])
def test_a_run_whose_pod_says_anything_can_be_suspended(
    tenants: Tenants, serve: Callable[..., Pod], body: bytes
) -> None:
    tenants.hostile.create("hostile")
    pod = serve(tenants.hostile.namespace, "hostile", saying(body))
    for _ in range(2):
        assert pod.asked.acquire(timeout=60)
    tenants.assert_healthy()
    tenants.hostile.edit({"runPolicy": {"suspend": True}}, "hostile")
    wait_for("its pods are gone", lambda: not tenants.hostile.pods(), timeout=60)
    status = tenants.hostile.wait("it is suspended", lambda s: s["phase"] == "Suspended", "hostile")
    assert_printable(status)


@pytest.mark.parametrize(
    "message",
    [
        "[" * 4000,
        json.dumps(result("preflight"))[:-1] + ', "progress": {"step": 1e999, "loss": NaN}}',
        json.dumps(result("train", reason="R" * 3000, message="s3://KEY:SECRET@b " * 20)),
        "\x1b[2J" * 900,
    ],
    ids=["nested", "infinite", "another-stage", "escapes"],
)
def test_a_termination_message_may_say_anything(tenants: Tenants, kubelet: FakeKubelet, message: str) -> None:
    tenants.hostile.create("hostile")
    kubelet.wait_phase(tenants.hostile.namespace, "hostile-preflight-0", timeout=60)
    kubelet.finish(tenants.hostile.namespace, "hostile-preflight-0", exit_code=65, message=message)
    told = tenants.hostile.wait(
        "it is told", lambda s: s["attempt"] > 1 or s["phase"] not in ("Pending", "Running"), "hostile"
    )
    assert_printable(told)
    assert "SECRET" not in json.dumps(told)
    tenants.assert_healthy()


# --- many and large objects


def test_a_tenant_with_many_runs_is_one_tenant(tenants: Tenants) -> None:
    for number in range(60):
        tenants.hostile.create(f"many-{number}")
    tenants.assert_healthy()


def test_large_pods_that_claim_to_be_workers(tenants: Tenants) -> None:
    before = tenants.memory()
    labels = {"app.kubernetes.io/managed-by": "internvl-operator", "internvl.dev/job": "nobody"}
    for number in range(60):
        metadata = {"name": f"large-{number}", "labels": labels, "annotations": {"a": "x" * 250_000}}
        body = {"metadata": metadata, "spec": {"containers": [{"name": "a", "image": "b"}]}}
        tenants.hostile.core.create_namespaced_pod(tenants.hostile.namespace, body)
    tenants.assert_healthy()
    assert tenants.memory() - before < 60e6


STATUSES = [
    {"attempt": 2**62, "phase": "Running", "observedGeneration": 2**62, "stage": "train"},
    {"stages": [{"name": "train", "state": "Running", "startedAt": "9999-12-31T23:59:59-14:00"}] * 3, "attempt": -5},
    {"conditions": [{"type": "Complete", "status": "True", "reason": "X", "message": "[/]" * 900}]},
    {"progressText": "[bold]x[/nope]\x1b[2J" * 50, "progress": {"stage": "train", "step": 2**62, "totalSteps": 1}},
]


@pytest.mark.parametrize("status", STATUSES, ids=["numbers", "stages", "complete", "markup"])
def test_a_status_that_somebody_else_wrote(tenants: Tenants, status: dict[str, Any]) -> None:
    tenants.hostile.create("hostile")
    wait_for("its first pod", tenants.hostile.pods, timeout=60)
    with contextlib.suppress(ApiException):  # the schema refuses some of it
        tenants.hostile.patch_status(status, "hostile")
    tenants.assert_healthy()
    tenants.hostile.delete("hostile")
    wait_for("its pods are gone or orphaned", lambda: "hostile" not in tenants.hostile.names(), timeout=60)


def test_idle_connections_hold_no_threads(tenants: Tenants) -> None:
    idle = []
    try:
        for port in [tenants.operator.metrics_port] * 300:
            with contextlib.suppress(OSError):
                idle.append(socket.create_connection(("127.0.0.1", port), timeout=2))
        tenants.assert_healthy()
        threads = psutil.Process(tenants.operator.pid).num_threads()
        tenants.measured.append(f"{threads} threads of the operator with {len(idle)} idle connections")
        assert threads < 200
    finally:
        for connection in idle:
            connection.close()

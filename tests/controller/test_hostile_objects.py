"""One tenant's object that a lax or older CRD let in: it costs its own run, never the operator or another tenant."""

import copy
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from controller.builders import spec
from controller.operator_process import Cluster, OperatorProcess
from internvl_api.constants import API_VERSION, GROUP, KIND, PLURAL, VERSION
from ivft_cluster.api_server import ApiServer
from ivft_cluster.crds import install_crd, load_crd
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.shell import wait_for

pytestmark = pytest.mark.integration
_names = (f"healthy-{number}" for number in itertools.count())


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
        self.operator = OperatorProcess(self.healthy, folder, NAMESPACES="")
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
        """The healthy tenant's next run gets its first pod from the same process."""
        pid, name = self.operator.pid, next(_names)
        self.healthy.create(name)
        wait_for("its first pod", lambda: f"{name}-preflight-0" in self.healthy.children()["Pod"], timeout=60)
        assert self.operator.ready()
        assert self.operator.pid == pid


@pytest.fixture
def tenants(lax: ApiServer, tmp_path: Path) -> Iterator[Tenants]:
    with lax.namespace("ivft-hostile") as hostile, lax.namespace("ivft-healthy") as healthy, FakeKubelet(lax.api):
        made = Tenants(lax, hostile, healthy, tmp_path)
        with made.operator:
            yield made


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
    process = psutil.Process(tenants.operator.pid)

    def edit(number: int) -> None:
        tenants.hostile.edit({"training": {"seed": number}}, name="large")
        generation = tenants.hostile.get("large")["metadata"]["generation"]
        tenants.hostile.wait("it is read", lambda status: status["observedGeneration"] == generation, name="large")

    for number in range(10):
        edit(number)
    before = process.memory_info().rss
    for number in range(10, 50):
        edit(number)
    assert process.memory_info().rss - before < 60e6  # kept for each edit, it would be 110 MB

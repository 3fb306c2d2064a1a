"""A whole run with secrets planted in addresses and the environment: nothing that it writes or sends holds one.

A real operator makes that run's pods on a real server and gets its last words: no object, Event or log holds one.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from controller.builders import result
from controller.operator_process import Cluster, OperatorProcess
from internvl_api.constants import ExitCode
from ivft_cluster.api_server import ApiServer
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.pki import Authority
from trainer.artifacts.hub_write_stand_in import HubWriteStandIn
from trainer.artifacts.web_server import WebServer, serving
from trainer.runs import GOLDEN, Stage, environment, make_config, write_config

pytestmark = [pytest.mark.slow, pytest.mark.integration]

SIGNATURE, VARIABLE, ACCESS_KEY, TOKEN = "planted-signature", "planted-variable", "planted-key", "hf_writer"
PASSWORD = "planted-password"  # in the words of an image of one's own, which redacts nothing
SECRETS = [SIGNATURE, VARIABLE, ACCESS_KEY, TOKEN, PASSWORD]


class RecordingHub(HubWriteStandIn):
    """The stand-in of the Hub, with the body of every request."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[bytes] = []

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        self.bodies.append(body)
        super().answer(handler, body)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[WebServer, RecordingHub, Path]]:
    pki = tmp_path / "pki"
    Authority.create(pki).issue("server", "server", hosts=["127.0.0.1"])
    data, hub = WebServer(), RecordingHub()
    for path in (GOLDEN / "data").rglob("*"):
        if path.is_file():
            data.files[f"/{path.relative_to(GOLDEN / 'data').as_posix()}"] = path.read_bytes()
    bad = {"image": "none.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
    data.files["/samples.jsonl"] += json.dumps(bad).encode() + b"\n"
    with serving(data, pki / "server.crt"), serving(hub):
        yield data, hub, pki / "ca.crt"


def run_all(servers: tuple[WebServer, RecordingHub, Path], folder: Path, bad_rows: str) -> Stage:
    data, hub, authority = servers
    folder.mkdir()
    sources = {
        "annotation": f"{data.url}/samples.jsonl?X-Amz-Signature={SIGNATURE}",
        "root": f"{data.url}/?$(SOURCE_QUERY)",
    }
    section = {"train": {"golden": sources}, "badRows": bad_rows, "maxBadRows": int(bad_rows == "skip")}
    sections = {
        "training": {"maxSteps": 2, "globalBatchSize": 2},
        "secrets": {"huggingFace": "token"},
        "publish": {"hub": {"repository": "team/tuned"}},
    }
    config = make_config(str(folder / "output"), data=section, **sections)
    path = write_config(config.model_copy(update={"allow_private_addresses": True}), folder)
    variables = {
        "SSL_CERT_FILE": str(authority),
        "SOURCE_QUERY": f"sig={VARIABLE}",
        "AWS_SECRET_ACCESS_KEY": ACCESS_KEY,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
    }
    stage = Stage(["run", "--config", str(path)], environment(folder, **variables), folder / "termination")
    try:
        stage.wait(400)
    finally:
        stage.process.kill()
    return stage


def in_a_cluster(server: ApiServer, data: WebServer, failed: Stage, folder: Path) -> dict[str, bytes]:
    """Everything but Secrets that a cluster shows of the run that failed, and of one whose image prints its secrets."""
    leaking = f"s3://KEY:{PASSWORD}@b https://h/x?sig={SIGNATURE} not found"
    with server.namespace("secrets") as namespace, FakeKubelet(server.api) as kubelet:
        cluster = Cluster(server, namespace)
        for name, values in (
            ("keys", {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": ACCESS_KEY}),
            ("token", {"HF_TOKEN": TOKEN, "HF_WRITE_TOKEN": TOKEN}),
            ("query", {"SOURCE_QUERY": f"sig={VARIABLE}"}),
        ):
            cluster.core.create_namespaced_secret(namespace, {"metadata": {"name": name}, "stringData": values})
        query = {"name": "SOURCE_QUERY", "valueFrom": {"secretKeyRef": {"name": "query", "key": "SOURCE_QUERY"}}}
        spec = {
            "data": {"train": {"golden": {"annotation": f"{data.url}/samples.jsonl?$(SOURCE_QUERY)"}}},
            "podTemplate": {"env": [query]},
            "secrets": {"objectStorage": "keys", "huggingFace": "token"},
            "publish": {"hub": {"repository": "team/tuned"}},
        }
        with OperatorProcess(cluster, folder, LOG_LEVEL="DEBUG") as operator:
            for name, message in (("failed", failed.output[-1500:]), ("leaking", leaking)):
                words = json.dumps(result("preflight", "failed", "BadRow", message=message))
                cluster.create(name, **spec)
                kubelet.wait_phase(namespace, f"{name}-preflight-0", timeout=60)
                kubelet.finish(namespace, f"{name}-preflight-0", ExitCode.USER_ERROR, words)
                cluster.wait_condition_seen("Stalled", "BadRow", name)
            with urllib.request.urlopen(f"http://127.0.0.1:{operator.metrics_port}/metrics", timeout=10) as answer:
                shown = {"the operator's metrics": answer.read()}
        shown["the operator's log"] = operator.log.read_bytes()
        listings: dict[str, Any] = {
            "pods": cluster.core.list_namespaced_pod,
            "ConfigMaps": cluster.core.list_namespaced_config_map,
            "Services": cluster.core.list_namespaced_service,
            "Events": cluster.core.list_namespaced_event,
        }
        shown["runs"] = json.dumps([cluster.get(name) for name in cluster.names()]).encode()
        for kind, listing in listings.items():
            # The kubelet keeps what the leaking image itself wrote in the status of its pod.
            selector = {"label_selector": "internvl.dev/job=failed"} if kind == "pods" else {}
            shown[kind] = listing(namespace, **selector, _preload_content=False).data
    assert b"BadRow" in shown["Events"]
    assert b"s3://b https://h/x?" in shown["runs"]
    assert b"SOURCE_QUERY" in shown["ConfigMaps"]
    return shown


def holding_a_secret(contents: dict[str, bytes]) -> list[str]:
    return [name for name, content in contents.items() if any(secret.encode() in content for secret in SECRETS)]


def test_nothing_that_a_run_writes_or_sends_holds_a_secret(
    servers: tuple[WebServer, RecordingHub, Path], served: ApiServer, tmp_path: Path
) -> None:
    failed = run_all(servers, tmp_path / "failed", "fail")
    assert failed.process.returncode == ExitCode.USER_ERROR, failed.output
    done = run_all(servers, tmp_path / "done", "skip")
    assert done.process.returncode == ExitCode.OK, done.output
    data, hub, _ = servers
    assert {f"X-Amz-Signature={SIGNATURE}", f"sig={VARIABLE}"} <= set(data.queries)

    contents = {"log of the failed run": failed.output.encode(), "log": done.output.encode()}
    for folder in ("failed", "done"):
        for path in (tmp_path / folder).rglob("*"):
            if path.is_file() and path != tmp_path / folder / "run.yaml":  # the file that a stage reads
                contents[str(path.relative_to(tmp_path))] = path.read_bytes()
    for number, body in enumerate(hub.bodies):
        contents[f"request {number} to the Hub"] = body
    for name, content in hub.repositories["team/tuned"].branches["main"].items():
        contents[f"Hub: {name}"] = content
    contents |= in_a_cluster(served, data, failed, tmp_path)
    names = " ".join(contents)
    for expected in ("preflight.json", "artifacts/run.yaml", "report/index.html", "Hub: README.md", "Hub: run.yaml"):
        assert expected in names
    assert holding_a_secret(contents) == []

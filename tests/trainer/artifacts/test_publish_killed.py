"""Publishing to a real S3 server that is killed on the way, or whose server refuses: what stays, what is sent again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
from internvl_api.constants import ExitCode
from internvl_api.run_config import RunConfig
from internvl_api.status import StageResult
from internvl_trainer.artifacts import s3
from internvl_trainer.artifacts.manifest import read_manifest
from internvl_trainer.artifacts.storage import Storage, open_storage
from ivft_cluster.s3 import S3Server
from ivft_cluster.shell import wait_for
from trainer.artifacts.finished_run import bytes_of, leave_run, sha256, shards
from trainer.artifacts.s3_proxy import S3Proxy, S3Request, proxied
from trainer.runs import environment, make_config, write_config

pytestmark = pytest.mark.integration
PARTS = 3
SHARD_BYTES = s3._TRANSFER.multipart_chunksize * 2 + 1000
SECOND = "run/artifacts/model/model-00002-of-00003.safetensors"


class Publisher:
    """`internvl-trainer publish` in a process of its own, which sees the S3 server through the proxy."""

    def __init__(self, server: S3Server, proxy: S3Proxy, bucket: str, folder: Path) -> None:
        self.server, self.proxy, self.folder, self.bucket = server, proxy, folder, bucket.removeprefix("s3://")
        self.storage: Storage = open_storage(f"{bucket}/run", field="spec.output")
        self.config: RunConfig = make_config(self.storage.uri)
        self.expected: dict[str, bytes] = {}
        self._path = write_config(self.config, folder)

    def leave(self, model: dict[str, bytes]) -> None:
        """A finished run with this model."""
        self.expected = leave_run(self.storage, self.config, model)

    def start(self, **variables: str) -> subprocess.Popen[str]:
        (self.folder / "result").write_text("")
        env = environment(self.folder, **{**self.server.env, "AWS_ENDPOINT_URL_S3": self.proxy.url, **variables})
        env |= {"INTERNVL_TERMINATION_LOG": str(self.folder / "result"), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "trainer.artifacts.report_stand_in", "publish", "--config", str(self._path)]
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    def run(self, **variables: str) -> tuple[int, StageResult, str]:
        """Exit code, last word and log of a whole attempt."""
        process = self.start(**variables)
        _, log = process.communicate(timeout=120)
        return process.returncode, StageResult.model_validate_json((self.folder / "result").read_text()), log

    def kill_at(self, which: Callable[[S3Request], bool], others: Collection[str] = ()) -> set[str]:
        """Start, and SIGKILL while the server has not answered that request, but has all of `others`.

        What is there then: keys of the objects that are whole.
        """
        self.proxy.hold(which)
        process = self.start()
        try:
            assert self.proxy.reached.wait(120), "that request was never sent"
            wait_for("the other files are there", lambda: self.stored().issuperset(others), timeout=60)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert read_manifest(self.storage, "artifacts") is None
        return self.stored()

    def stored(self) -> set[str]:
        """Keys of the objects that are whole; asked of the server itself."""
        return {file.key for file in self.storage.list("artifacts/")}

    def unfinished(self) -> list[str]:
        """Keys of multipart uploads that nobody finished."""
        found = self.server.client().list_multipart_uploads(Bucket=self.bucket)
        return [upload["Key"] for upload in found.get("Uploads", [])]


@pytest.fixture
def publisher(s3_env: S3Server, bucket: str, tmp_path: Path) -> Iterator[Publisher]:
    with proxied(s3_env.endpoint) as proxy:
        yield Publisher(s3_env, proxy, bucket, tmp_path)


def test_killed_three_times_in_an_upload_and_nothing_is_lost_or_sent_twice(publisher: Publisher) -> None:
    publisher.leave(shards(PARTS, SHARD_BYTES))
    kills: list[Callable[[S3Request], bool]] = [
        lambda request: request.key == SECOND and request.part == "2",
        lambda request: request.key == SECOND and request.method == "POST" and "uploadId" in request.query,
        lambda request: request.method == "PUT" and request.key == "run/artifacts/manifest.json",
    ]
    whole, asked = [], []
    others = {f"artifacts/{name}" for name in shards(PARTS, 0)} - {SECOND.removeprefix("run/")}
    for which in kills:
        whole.append(publisher.kill_at(which, others))
        asked.append(len(publisher.proxy.requests))
        if len(whole) == 1:
            assert SECOND.removeprefix("run/") not in whole[0]
            assert publisher.unfinished() == [SECOND]
    publisher.proxy.hold(lambda _: False)
    code, result, log = publisher.run()

    assert (code, result.reason) == (ExitCode.OK, "Published"), log
    manifest = read_manifest(publisher.storage, "artifacts")
    assert manifest is not None
    digests = {file.path: sha256(publisher.storage.read(f"artifacts/{file.path}")) for file in manifest.files}
    assert digests == {file.path: file.sha256 for file in manifest.files}
    assert digests.items() >= {name: sha256(content) for name, content in publisher.expected.items()}.items()
    assert publisher.unfinished() == []
    assert len(whole[2]) == len(manifest.files)
    for there, before in zip(whole, asked, strict=True):
        written = {request.key for request in publisher.proxy.requests[before:] if request.writes}
        assert written.isdisjoint(f"run/{key}" for key in there)
    writes = [request.key for request in publisher.proxy.requests if request.writes and "artifacts/" in request.key]
    assert writes[-1] == "run/artifacts/manifest.json"


def test_the_server_copies_and_nothing_of_the_weights_goes_through_the_pod(publisher: Publisher) -> None:
    publisher.leave(shards(PARTS, SHARD_BYTES))
    code, _, log = publisher.run()
    assert code == ExitCode.OK, log
    weights = {f"run/artifacts/{name}" for name in shards(PARTS, 0)}
    of_weights = [request for request in publisher.proxy.requests if request.key in weights]
    parts = [request for request in of_weights if request.part]
    assert len(parts) == PARTS * PARTS
    assert all(request.copied for request in parts)
    assert "GET" not in {request.method for request in of_weights}


def test_weights_that_changed_since_training_are_read_and_refused(publisher: Publisher) -> None:
    publisher.leave(shards(PARTS, SHARD_BYTES))
    other = bytes_of("other bytes", SHARD_BYTES)
    publisher.server.client().put_object(
        Bucket=publisher.bucket, Key=SECOND.replace("artifacts", "stages/train"), Body=other
    )
    code, result, _ = publisher.run()
    assert (code, result.reason) == (ExitCode.USER_ERROR, "ArtifactBroken")
    assert SECOND in result.message
    assert read_manifest(publisher.storage, "artifacts") is None


REFUSALS = [
    pytest.param(403, "AccessDenied", ExitCode.ACCESS_DENIED, "AccessDenied", id="403"),
    pytest.param(404, "NoSuchKey", ExitCode.USER_ERROR, "NotFound", id="404"),
    pytest.param(503, "SlowDown", ExitCode.UNAVAILABLE, "StorageUnavailable", id="503"),
]


@pytest.mark.parametrize(("status", "word", "code", "reason"), REFUSALS)
def test_a_server_that_refuses_a_copy_is_named_and_the_rest_stays(
    publisher: Publisher, status: int, word: str, code: int, reason: str
) -> None:
    publisher.leave(shards(2, 1000))
    second = "artifacts/model/model-00002-of-00002.safetensors"
    publisher.proxy.refused = lambda request: (
        (status, word) if request.copied and request.key.endswith(second) else None
    )
    refused = publisher.run()
    assert (refused[0], refused[1].reason) == (code, reason), refused[2]
    assert refused[1].message.startswith("spec.output: ")
    assert "model-00002-of-00002.safetensors" in refused[1].message
    assert "Traceback" not in refused[2]
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in refused[2]
    assert "artifacts/model/model-00001-of-00002.safetensors" in publisher.stored()
    assert read_manifest(publisher.storage, "artifacts") is None
    publisher.proxy.refused = lambda _: None
    assert publisher.run()[0] == ExitCode.OK


def test_a_right_to_list_uploads_is_not_needed(publisher: Publisher) -> None:
    publisher.leave(shards(2, 1000))
    publisher.proxy.refused = lambda request: (403, "AccessDenied") if "uploads" in request.query else None
    code, _, log = publisher.run()
    assert code == ExitCode.OK, log
    assert "unfinished uploads under" in log

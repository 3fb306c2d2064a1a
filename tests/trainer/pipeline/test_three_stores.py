"""The same run with its inputs and its output in S3, Google Cloud Storage and Azure publishes the same files."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from internvl_api.constants import ExitCode
from internvl_trainer.artifacts.manifest import check_sizes, read_manifest
from internvl_trainer.artifacts.storage import open_storage
from ivft_cluster.azurite import Azurite
from ivft_cluster.gcs_server import GcsServer
from ivft_cluster.s3 import S3Server
from trainer.artifacts.conftest import forget_client
from trainer.runs import GOLDEN, environment, make_config, write_config

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def stores(
    s3_server: S3Server, gcs_server: GcsServer, azurite: Azurite, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """The URI of an empty bucket in each store; this process has the credentials of all."""
    for name, value in {**s3_server.env, **gcs_server.env, **azurite.env}.items():
        monkeypatch.setenv(name, value)
    forget_client()
    name = f"stores-{uuid.uuid4().hex[:12]}"
    s3_server.client().create_bucket(Bucket=name)
    return {"s3": f"s3://{name}", "gs": gcs_server.new_bucket(), "az": azurite.new_container()}


# The stages one after the other in one process, which imports everything once.
RUN = """
import sys
from internvl_trainer.__main__ import main
for stage in ("preflight", "train", "publish"):
    if code := main([stage, "--config", sys.argv[1]]):
        sys.exit(code)
"""


def start(uri: str, folder: Path) -> subprocess.Popen[str]:
    """The run, which trains two steps from a model and rows in the store."""
    folder.mkdir()
    storage = open_storage(uri, field="test")
    for path in (GOLDEN / "data").rglob("*"):
        if path.is_file() and path.suffix != ".npz":
            storage.upload(path, f"data/{path.relative_to(GOLDEN / 'data')}")
    for path in (GOLDEN / "checkpoints" / "qwen2").iterdir():
        if path.suffix != ".npz":
            storage.upload(path, f"model/{path.name}")
    data = {"train": {"golden": {"annotation": f"{uri}/data/samples.jsonl", "root": f"{uri}/data"}}}
    training = {"maxSteps": 2, "globalBatchSize": 2}
    config = make_config(f"{uri}/team/run", f"{uri}/model", data=data, training=training, checkpoint={"everySteps": 1})
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(write_config(config, folder))],
        env=environment(folder, INTERNVL_TERMINATION_LOG=str(folder / "result")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_same_run_publishes_the_same_files(stores: dict[str, str], tmp_path: Path) -> None:
    runs = {name: start(uri, tmp_path / name) for name, uri in stores.items()}
    try:
        for run in runs.values():
            output, _ = run.communicate()
            assert run.returncode == ExitCode.OK, output
    finally:
        for run in runs.values():
            run.kill()
            run.wait()
    published: dict[str, dict[str, str]] = {}
    for name, uri in stores.items():
        storage = open_storage(f"{uri}/team/run", field="test")
        manifest = read_manifest(storage, "artifacts")
        assert manifest is not None
        check_sizes(storage, "artifacts", manifest)
        published[name] = {file.path: file.sha256 for file in manifest.files if file.path.startswith("model/")}
    assert "model/model.safetensors" in published["s3"]
    assert published["gs"] == published["s3"]
    assert published["az"] == published["s3"]

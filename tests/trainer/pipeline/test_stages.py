"""The stages as a user or the operator starts them: on S3, with what can go wrong, and what is skipped."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from internvl_api.constants import ExitCode
from internvl_trainer.artifacts.manifest import check_sizes, fetch_files, read_manifest
from internvl_trainer.artifacts.storage import Storage, open_storage
from internvl_trainer.model.load import load_chat_model
from ivft_cluster.s3 import S3Server
from safetensors.torch import load_file
from trainer.runs import GOLDEN, STEPS, Stage, environment, make_config, started, write_config


class Remote:
    """A bucket with the golden data, and stages that run against it."""

    def __init__(self, server: S3Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.uri = f"s3://stages-{uuid.uuid4().hex[:12]}"
        server.client().create_bucket(Bucket=self.uri.removeprefix("s3://"))
        for path in (GOLDEN / "data").rglob("*"):
            if path.is_file() and path.suffix != ".npz":
                self.put(f"data/{path.relative_to(GOLDEN / 'data')}", path.read_bytes())
        for path in (GOLDEN / "checkpoints" / "internlm2").iterdir():
            if path.suffix != ".npz":
                self.put(f"model/{path.name}", path.read_bytes())

    def put(self, key: str, data: bytes) -> None:
        self.server.client().put_object(Bucket=self.uri.removeprefix("s3://"), Key=key, Body=data)

    def get(self, key: str) -> bytes:
        body: bytes = self.server.client().get_object(Bucket=self.uri.removeprefix("s3://"), Key=key)["Body"].read()
        return body

    def config(self, name: str, *, annotation: str = "data/samples.jsonl", **sections: Any) -> Path:
        data = {"train": {"golden": {"annotation": f"{self.uri}/{annotation}", "root": f"{self.uri}/data"}}}
        data |= sections.pop("data", {})
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        output = sections.pop("output", f"{self.uri}/{name}")
        return write_config(make_config(output, f"{self.uri}/model", data=data, **sections), self.folder / name)

    def start(self, command: str, config: Path, *arguments: str, **variables: str) -> Stage:
        env = environment(self.folder, **{**self.server.env, **variables})
        return Stage([command, "--config", str(config), *arguments], env, config.parent / f"result-{command}")

    def run(self, command: str, config: Path, *arguments: str, **variables: str) -> Stage:
        stage = self.start(command, config, *arguments, **variables)
        try:
            stage.wait()
        finally:
            stage.process.kill()
        return stage


@pytest.fixture(scope="module")
def remote(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Remote:
    return Remote(s3_server, tmp_path_factory.mktemp("remote"))


@pytest.fixture
def storage(remote: Remote, finished: Stage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """The output of the finished run."""
    from internvl_trainer.artifacts import s3

    for name, value in remote.server.env.items():
        monkeypatch.setenv(name, value)
    s3._client.cache_clear()
    yield open_storage(f"{remote.uri}/full", field="spec.output")
    s3._client.cache_clear()


@pytest.fixture(scope="module")
def finished(remote: Remote) -> Stage:
    """A whole run of a full fine-tune, on S3, in two processes, one bad row skipped."""
    rows = (GOLDEN / "data" / "samples.jsonl").read_bytes() + b'{"image": "images/none.png", "conversations": ['
    rows += b'{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]}\n'
    remote.put("data/with-bad-row.jsonl", rows)
    data = {"badRows": "skip", "maxBadRows": 1}
    config = remote.config("full", annotation="data/with-bad-row.jsonl", data=data, training={"dataWorkers": 1})
    return remote.run("run", config, "--nproc", "2")


pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_run_does_every_stage(finished: Stage, remote: Remote) -> None:
    assert finished.process.returncode == ExitCode.OK, finished.output
    for text in ("Checked", "Trained", "Published", f"step {STEPS}/{STEPS}", f"{remote.uri}/full/artifacts/model"):
        assert text in finished.output


def test_artifacts_have_a_manifest_that_holds(storage: Storage, tmp_path: Path) -> None:
    manifest = read_manifest(storage, "artifacts")
    assert manifest is not None
    check_sizes(storage, "artifacts", manifest)
    fetch_files(storage, "artifacts", manifest.files, tmp_path)
    names = {file.path for file in manifest.files}
    assert names >= {"run.yaml", "preflight.json", "metrics.jsonl", "README.md", "model/model.safetensors"}
    assert (tmp_path / "report" / "index.html").read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert (tmp_path / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in names)
    stored = {file.key.removeprefix("artifacts/") for file in storage.list("artifacts/")}
    assert stored == names | {"manifest.json"}


def test_the_model_is_upstreams_format_with_everything_carried_over(storage: Storage, tmp_path: Path) -> None:
    manifest = read_manifest(storage, "artifacts")
    assert manifest is not None
    fetch_files(storage, "artifacts", manifest.named("model/"), tmp_path)
    base, model = GOLDEN / "checkpoints" / "internlm2", tmp_path / "model"
    for path in base.iterdir():
        if path.suffix in (".py", ".json", ".model") and path.name != "config.json":
            assert (model / path.name).read_bytes() == path.read_bytes()
    config = json.loads((model / "config.json").read_text())
    assert (config["model_type"], config["max_dynamic_patch"]) == ("internvl_chat", 6)
    before, after = load_file(base / "model.safetensors"), load_file(model / "model.safetensors")
    assert sorted(before) == sorted(after)
    assert torch.equal(
        before["vision_model.embeddings.class_embedding"], after["vision_model.embeddings.class_embedding"]
    )
    assert not torch.equal(
        before["language_model.model.layers.0.attention.wqkv.weight"],
        after["language_model.model.layers.0.attention.wqkv.weight"],
    )
    load_chat_model(model, dtype=torch.float32)


def test_the_skipped_row_is_listed(storage: Storage) -> None:
    report = json.loads(storage.read("artifacts/preflight.json"))
    assert report["skippedLines"] == {"golden": [7]}
    assert [finding["reason"] for finding in report["findings"]] == ["ImageMissing"]
    assert report["datasets"][0]["rowsInEpoch"] == 6


def test_a_finished_run_is_not_done_again(finished: Stage, remote: Remote) -> None:
    config = remote.folder / "full" / "run.yaml"
    before = remote.get("full/artifacts/manifest.json")
    again = remote.run("publish", config)
    assert again.process.returncode == ExitCode.OK
    assert again.result.reason == "AlreadyDone"
    assert again.result.artifacts["model"] == f"{remote.uri}/full/artifacts/model"
    assert remote.get("full/artifacts/manifest.json") == before


def test_another_run_under_the_same_output_is_refused(finished: Stage, remote: Remote) -> None:
    original = (remote.folder / "full" / "run.yaml").read_text()
    changed = remote.folder / "changed"
    changed.mkdir()
    (changed / "run.yaml").write_text(original.replace("learningRate: 0.003", "learningRate: 0.004"))
    stage = remote.run("preflight", changed / "run.yaml")
    assert stage.process.returncode == ExitCode.USER_ERROR
    assert stage.result.reason == "OutputHoldsAnotherRun"
    assert "differs in spec.training.learningRate: it has 0.003, this run 0.004" in stage.result.message
    assert "Traceback" not in stage.output


def test_what_does_not_change_the_curve_may_differ(finished: Stage, remote: Remote) -> None:
    original = (remote.folder / "full" / "run.yaml").read_text()
    changed = remote.folder / "faster"
    changed.mkdir()
    (changed / "run.yaml").write_text(
        original.replace("zeroStage: 1", "zeroStage: 3").replace("workers: 1", "workers: 2")
    )
    again = remote.run("train", changed / "run.yaml").result
    assert again.reason == "AlreadyDone"
    assert again.progress is not None, "else status would keep the figures of an attempt that was lost"
    assert again.progress.step == again.progress.total_steps
    assert again.progress.loss is not None


BAD_INPUT = [
    pytest.param(
        {"annotation": "data/none.jsonl"},
        {},
        ExitCode.USER_ERROR,
        "NotFound",
        "spec.data.train.golden.annotation: found no object {uri}/data/none.jsonl; check the URI",
        id="annotation absent",
    ),
    pytest.param(
        {"annotation": "data/broken.jsonl"},
        {},
        ExitCode.USER_ERROR,
        "InvalidJson",
        "{uri}/data/broken.jsonl:2: not valid JSON",
        id="a line that is no JSON",
    ),
    pytest.param(
        {"annotation": "data/no-image.jsonl"},
        {},
        ExitCode.USER_ERROR,
        "ImageMissing",
        "{uri}/data/no-image.jsonl:1: image: images/none.png is not below {uri}/data",
        id="an image that is not there",
    ),
    pytest.param(
        {"model": {"source": "{uri}/nothing"}},
        {},
        ExitCode.USER_ERROR,
        "NotFound",
        "spec.model.source: found no file under {uri}/nothing; check the URI",
        id="model absent",
    ),
    pytest.param(
        {"model": {"source": "{uri}/half-a-model"}},
        {},
        ExitCode.USER_ERROR,
        "ShardMissing",
        "{uri}/half-a-model: 1 of 2 weight files are missing, such as model-00002-of-00002.safetensors",
        id="a shard absent",
    ),
    pytest.param(
        {},
        {"AWS_SECRET_ACCESS_KEY": "a-wrong-secret-key"},
        ExitCode.ACCESS_DENIED,
        "AccessDenied",
        "spec.model.source: {uri}/model was refused",
        id="wrong credentials",
    ),
    pytest.param(
        {},
        {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"},
        ExitCode.UNAVAILABLE,
        "StorageUnavailable",
        "check AWS_ENDPOINT_URL and that the server runs",
        id="storage away",
    ),
    pytest.param(
        {"output": "s3://no-such-bucket-here/x"},
        {},
        ExitCode.USER_ERROR,
        "NoSuchBucket",
        "spec.output: found no bucket 'no-such-bucket-here'",
        id="bucket absent",
    ),
]


@pytest.mark.parametrize(("changes", "variables", "code", "reason", "message"), BAD_INPUT)
def test_bad_input_gets_one_clear_message(
    remote: Remote, changes: dict[str, Any], variables: dict[str, str], code: int, reason: str, message: str
) -> None:
    good = (GOLDEN / "data" / "samples.jsonl").read_bytes().splitlines(keepends=True)[0]
    remote.put("data/broken.jsonl", good + b'{"conversations": [\n')
    remote.put("data/no-image.jsonl", b'{"image": "images/none.png", "conversations": [{"from": "human", "value": '
               b'"<image>?"}, {"from": "gpt", "value": "!"}]}\n')  # fmt: skip
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    remote.put("half-a-model/config.json", b"{}")
    remote.put("half-a-model/model.safetensors.index.json", json.dumps(index).encode())
    remote.put("half-a-model/model-00001-of-00002.safetensors", b"")
    shutil.rmtree(remote.folder / "bad", ignore_errors=True)
    text = json.loads(json.dumps(changes).replace("{uri}", remote.uri))
    stage = remote.run("preflight", remote.config("bad", **text), **variables)
    assert stage.process.returncode == code, stage.output
    assert stage.result.outcome == "failed"
    assert stage.result.reason == reason
    assert message.format(uri=remote.uri) in stage.result.message
    assert stage.result.message in stage.output
    assert "Traceback" not in stage.output
    assert "a-wrong-secret-key" not in stage.output


def test_publish_before_train_says_what_to_do(remote: Remote) -> None:
    stage = remote.run("publish", remote.config("early"))
    assert stage.process.returncode == ExitCode.USER_ERROR
    assert "run `internvl-trainer train` first" in stage.result.message


def test_run_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("job: x\nsurprise: 1\n")
    with started(["preflight", "--config", str(path)], environment(tmp_path), tmp_path / "result") as stage:
        assert stage.wait() == ExitCode.CONFIG
    assert "surprise" in stage.output
    assert "Traceback" not in stage.output

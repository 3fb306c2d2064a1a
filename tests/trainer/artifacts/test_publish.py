"""What publishing brings under artifacts/, what it keeps of an earlier attempt, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from internvl_trainer.artifacts.manifest import ManifestError, commit, read_manifest
from internvl_trainer.artifacts.output_layout import stored_checkpoints
from internvl_trainer.artifacts.storage import FolderStorage, Storage, open_storage
from internvl_trainer.errors import Rejected, UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.run_context import RunContext
from internvl_trainer.stages.publish import run as publish
from trainer.artifacts.finished_run import BASELINE, FIGURES, TASK, bytes_of, leave_run, leave_stage, sha256
from trainer.artifacts.report_stand_in import CARD, PAGE, stand_ins
from trainer.runs import GOLDEN, make_config

SERVED = ("s3://", "gs://")
FULL: dict[str, Any] = {
    "method": "lora",
    "merge": {"formats": ["upstream"]},
    "evaluation": {"tasks": {"coco": TASK}, "baseline": True, "publishIf": "CIDEr > baseline.CIDEr"},
}


@pytest.fixture(autouse=True)
def report(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in stand_ins().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def reporter() -> Reporter:
    return Reporter("team/run", "publish")


def contents(storage: Storage) -> dict[str, bytes]:
    """Everything under artifacts/ but the manifest."""
    keys = [file.key for file in storage.list("artifacts/") if file.key != "artifacts/manifest.json"]
    return {key.removeprefix("artifacts/"): storage.read(key) for key in keys}


def test_everything_that_a_run_made_is_published(storage: Storage, reporter: Reporter) -> None:
    config = make_config(storage.uri, **FULL)
    expected = leave_run(storage, config)
    result = publish(RunContext("publish", config, storage, reporter))
    found = contents(storage)
    evaluation = json.loads(found.pop("evaluation.json"))
    serving = {"serve": f"{storage.uri}/artifacts/serve.yaml"} if storage.uri.startswith(SERVED) else {}
    if serving:
        assert storage.uri.encode() in found.pop("serve.yaml")  # tests/trainer/report has the rest
    assert evaluation == {"baseline": BASELINE, "final": FIGURES, "condition": "CIDEr > baseline.CIDEr"}
    made = {"report/index.html": PAGE, "report/loss.png": b"\x89PNG stand-in", "README.md": CARD.encode()}
    assert found == expected | made | {"run.yaml": config.to_yaml().encode()}
    manifest = read_manifest(storage, "artifacts")
    assert manifest is not None
    assert {file.path: file.sha256 for file in manifest.files if file.path in found} == {
        name: sha256(content) for name, content in found.items()
    }
    root = f"{storage.uri}/artifacts"
    assert result.artifacts == serving | {
        "adapter": f"{root}/adapter",
        "model": f"{root}/model",
        "evaluation": f"{root}/evaluation.json",
        "report": f"{root}/report/index.html",
        "tensorboard": f"{root}/tensorboard",
        "runConfig": f"{root}/run.yaml",
        "preflight": f"{root}/preflight.json",
        "metrics": f"{root}/metrics.jsonl",
    }


class Writes:
    """Keys that a storage was asked to write or delete, in order."""

    def __init__(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        for name in ("copy", "upload", "write", "delete"):
            monkeypatch.setattr(storage, name, self._noting(name, getattr(storage, name)))

    def _noting(self, name: str, method: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            key = arguments[0] if name in ("write", "delete") else arguments[1]
            self.done.append(f"{name} {key}")
            return method(*arguments, **options)

        return call

    def under(self, folder: str) -> list[str]:
        return [each for each in self.done if each.split()[1].startswith(folder)]


def test_a_full_run_publishes_the_model_that_training_wrote(storage: Storage, reporter: Reporter) -> None:
    config = make_config(storage.uri)
    expected = leave_run(storage, config)
    result = publish(RunContext("publish", config, storage, reporter))
    found = contents(storage)
    assert found.items() >= expected.items()
    made = {"README.md", "run.yaml", "report/index.html", "report/loss.png"}
    assert found.keys() - expected.keys() == made | ({"serve.yaml"} if storage.uri.startswith(SERVED) else set())
    assert {"adapter", "evaluation"}.isdisjoint(result.artifacts)


@pytest.mark.parametrize(
    ("after_success", "left"),
    [
        pytest.param("keep", {"step-00000010.000002"}, id="the newest whole one stays"),
        pytest.param("delete", set(), id="none stays"),
    ],
)
def test_checkpoints_of_a_published_run_go_after_its_manifest(
    storage: Storage, reporter: Reporter, monkeypatch: pytest.MonkeyPatch, after_success: str, left: set[str]
) -> None:
    config = make_config(storage.uri, checkpoint={"afterSuccess": after_success})
    leave_run(storage, config)
    for folder in ("step-00000005.000001", "step-00000010.000002"):
        storage.write(f"checkpoints/{folder}/rank-00000-000.safetensors", b"state")
        storage.write(f"checkpoints/{folder}/manifest.json", b"{}")
    storage.write("checkpoints/step-00000015.000002/rank-00000-000.safetensors", b"partial")
    writes = Writes(storage, monkeypatch)
    publish(RunContext("publish", config, storage, reporter))
    folders = {file.key.split("/")[1] for file in storage.list("checkpoints/")}
    assert folders == left
    first = next(number for number, each in enumerate(writes.done) if each.startswith("delete checkpoints/"))
    assert writes.done.index("write artifacts/manifest.json") < first
    assert first < writes.done.index("write stages/publish/manifest.json"), "a crash before it deletes again"


def test_the_best_checkpoint_of_a_published_run_stays_with_the_newest(storage: Storage, reporter: Reporter) -> None:
    validation = {"held": {"annotation": str(GOLDEN / "data" / "samples.jsonl")}}
    config = make_config(storage.uri, data={"validation": validation}, checkpoint={"keepBest": True})
    leave_run(storage, config)
    for step in (5, 10, 15):
        commit(storage, f"checkpoints/step-{step:08d}", [], "fingerprint", step=step, best=5)
    publish(RunContext("publish", config, storage, reporter))
    assert stored_checkpoints(storage) == ["checkpoints/step-00000015", "checkpoints/step-00000005"]


def test_a_run_that_cannot_be_published_keeps_its_checkpoints(
    storage: Storage, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(storage.uri, checkpoint={"afterSuccess": "delete"})
    leave_run(storage, config)
    storage.write("checkpoints/step-00000010/manifest.json", b"{}")

    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("AccessDenied", "no more copies", "spec.output")

    monkeypatch.setattr(storage, "copy", refuse)
    with pytest.raises(UserError, match="no more copies"):
        publish(RunContext("publish", config, storage, reporter))
    assert storage.stat("checkpoints/step-00000010/manifest.json") is not None


def test_a_model_that_was_merged_takes_the_place_of_the_trained_one(storage: Storage, reporter: Reporter) -> None:
    config = make_config(storage.uri, merge={"formats": ["upstream", "hf"]})
    leave_run(storage, config)
    leave_stage(storage, config, "merge", {"model/one.safetensors": b"1", "model-hf/two.safetensors": b"2"})
    result = publish(RunContext("publish", config, storage, reporter))
    models = {name: data for name, data in contents(storage).items() if name.startswith("model")}
    assert models == {"model/one.safetensors": b"1", "model-hf/two.safetensors": b"2"}
    assert result.artifacts["modelHf"] == f"{storage.uri}/artifacts/model-hf"


@pytest.mark.parametrize("stage", ["train", "baseline-evaluate", "evaluate", "merge"])
def test_a_stage_that_is_not_done_is_named(storage: Storage, reporter: Reporter, stage: str) -> None:
    config = make_config(storage.uri, **FULL)
    leave_run(storage, config)
    storage.delete(f"stages/{stage}/manifest.json")
    with pytest.raises(UserError, match=f"run `internvl-trainer {stage}` first") as caught:
        publish(RunContext("publish", config, storage, reporter))
    assert caught.value.reason == "StageMissing"
    assert not list(storage.list("artifacts/"))


def test_nothing_is_published_below_the_threshold(storage: Storage, reporter: Reporter) -> None:
    config = make_config(storage.uri, **{**FULL, "evaluation": {**FULL["evaluation"], "publishIf": "CIDEr >= 1.5"}})
    leave_run(storage, config)
    with pytest.raises(Rejected) as caught:
        publish(RunContext("publish", config, storage, reporter))
    result = caught.value.result
    assert (result.stage, result.reason) == ("publish", "EvaluationBelowThreshold")
    assert "CIDEr = 1.3100; publishIf: CIDEr >= 1.5; nothing is published" in result.message
    assert result.artifacts.keys() == {"adapter", "report"}
    assert not list(storage.list("artifacts/"))


def test_a_second_attempt_sends_nothing_again(
    storage: Storage, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(storage.uri, **FULL)
    leave_run(storage, config)
    first = publish(RunContext("publish", config, storage, reporter))
    before = storage.read("artifacts/manifest.json")
    storage.delete("stages/publish/manifest.json")
    writes = Writes(storage, monkeypatch)
    assert publish(RunContext("publish", config, storage, reporter)).artifacts == first.artifacts
    assert writes.done == ["write stages/publish/manifest.json"]
    assert storage.read("artifacts/manifest.json") == before


def test_what_did_not_change_is_kept_and_the_manifest_goes_first(
    storage: Storage, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_run(storage, make_config(storage.uri, **FULL))
    publish(RunContext("publish", make_config(storage.uri, **FULL), storage, reporter))
    storage.write("artifacts/model/of-an-older-run.safetensors", b"stray")
    storage.delete("artifacts/adapter/adapter_config.json")
    storage.write("artifacts/model/model-00001-of-00002.safetensors", bytes_of("same size, other bytes", 1000))
    changed = make_config(storage.uri, **{**FULL, "checkpoint": {"keep": 5}})
    storage.delete("stages/publish/manifest.json")
    writes = Writes(storage, monkeypatch)
    publish(RunContext("publish", changed, storage, reporter))
    done = writes.under("artifacts/")
    assert done[0] == "delete artifacts/manifest.json"
    assert done[-1] == "write artifacts/manifest.json"
    assert set(done[1:-1]) == {
        "delete artifacts/model/of-an-older-run.safetensors",
        "copy artifacts/adapter/adapter_config.json",
        "copy artifacts/model/model-00001-of-00002.safetensors",
        "upload artifacts/run.yaml",
    }
    assert storage.read("artifacts/run.yaml") == changed.to_yaml().encode()


def test_a_file_that_changed_since_its_stage_is_not_published(storage: Storage, reporter: Reporter) -> None:
    config = make_config(storage.uri)
    leave_run(storage, config)
    place = "stages/train/model/model-00001-of-00002.safetensors"
    storage.write(place, bytes_of("same size, other bytes", 1000))
    with pytest.raises(ManifestError, match=f"{storage.uri}/{place}") as caught:
        publish(RunContext("publish", config, storage, reporter))
    assert caught.value.reason == "ArtifactBroken"
    assert read_manifest(storage, "artifacts") is None


def test_on_disk_a_published_file_takes_no_second_place(tmp_path: Path, reporter: Reporter) -> None:
    storage = open_storage(str(tmp_path), field="spec.output")
    config = make_config(str(tmp_path))
    leave_run(storage, config)
    publish(RunContext("publish", config, storage, reporter))
    name = "model/model-00001-of-00002.safetensors"
    assert (tmp_path / "artifacts" / name).samefile(tmp_path / "stages" / "train" / name)


def test_a_disk_without_hard_links_is_copied_to(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    storage = open_storage(str(tmp_path), field="spec.output")
    config = make_config(str(tmp_path))
    expected = leave_run(storage, config)
    publish(RunContext("publish", config, storage, reporter))
    assert contents(storage).items() >= expected.items()
    name = "model/model-00001-of-00002.safetensors"
    assert not (tmp_path / "artifacts" / name).samefile(tmp_path / "stages" / "train" / name)


def test_half_a_file_of_a_killed_copy_goes_away(tmp_path: Path, reporter: Reporter) -> None:
    storage = FolderStorage(tmp_path, field="spec.output")
    config = make_config(str(tmp_path))
    leave_run(storage, config)
    storage.write("artifacts/model/.writing-x7", b"half")
    publish(RunContext("publish", config, storage, reporter))
    assert not [name for name in contents(storage) if ".writing-" in name]

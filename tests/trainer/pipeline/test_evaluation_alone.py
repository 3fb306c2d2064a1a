"""`internvl-trainer run` with method none: a model, or an adapter on it, is evaluated and nothing is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from internvl_api.constants import ExitCode
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.run_config import RunConfig
from internvl_trainer.__main__ import main
from internvl_trainer.cli.run import for_this_run
from internvl_trainer.errors import UserError
from internvl_trainer.model.adapter_base import identify_base
from internvl_trainer.model.adapter_files import save_adapter
from internvl_trainer.model.checkpoint_source import open_checkpoint
from internvl_trainer.report.comparison import compare
from internvl_trainer.report.page import banner
from internvl_trainer.report.record import Record
from internvl_trainer.stages.preflight import check_adapter
from safetensors.torch import load_file, save_file
from trainer.evaluations import load_with_adapter, predictions, run_evaluation, write_vqa
from trainer.runs import GOLDEN, write_config

BASE = GOLDEN / "checkpoints" / "qwen2"


def alone_config(folder: Path, *, model: dict[str, Any] | None = None, **evaluation: Any) -> RunConfig:
    """An evaluation of a golden checkpoint on drawn pictures; its output is folder/output."""
    spec = {
        "model": {"source": str(BASE), **(model or {})},
        "method": "none",
        "image": {"maxDynamicPatch": 2},
        "training": {"precision": "fp32"},
        "evaluation": {
            "tasks": {"colours": {"task": "vqa", "annotation": str(write_vqa(folder, 6))}},
            **evaluation,
        },
        "output": str(folder / "output"),
    }
    return resolve(parse_spec(spec), job="team/check", job_uid="uid-1")


def published(folder: Path) -> set[str]:
    artifacts = folder / "output" / "artifacts"
    return {path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_run_evaluates_and_publishes_figures_without_weights(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    path = write_config(alone_config(tmp_path), tmp_path)
    assert main(["run", str(path)]) == ExitCode.OK
    stages = {folder.name for folder in (tmp_path / "output" / "stages").iterdir()}
    assert stages == {"preflight", "evaluate", "publish"}
    assert published(tmp_path) == {
        "evaluation.json",
        "manifest.json",
        "predictions/evaluate/colours.jsonl",
        "preflight.json",
        "report/index.html",
        "report/metrics.png",
        "run.yaml",
    }
    figures = json.loads((tmp_path / "output/artifacts/evaluation.json").read_text())
    assert figures["baseline"] == {}
    assert "vqa_accuracy" in figures["final"]["colours"]
    page = (tmp_path / "output/artifacts/report/index.html").read_text()
    assert "are cut at maxNewTokens. Evaluated. No publishing condition" in page
    compared = ("improved", "fine-tuning", "Fine-tuning", "Training", "Before", "base model", "Base model")
    assert [word for word in compared if word in page] == []
    shown = capfd.readouterr()
    assert "vqa_accuracy" in shown.out + shown.err
    assert "before" not in shown.out + shown.err

    assert main(["run", str(path)]) == ExitCode.OK  # again: nothing is left to do
    assert "every stage is done" in "".join(capfd.readouterr())


@pytest.mark.slow
def test_a_condition_that_does_not_hold_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    path = write_config(alone_config(tmp_path, publishIf="vqa_accuracy > 2"), tmp_path)
    assert main(["run", str(path)]) == ExitCode.REJECTED
    assert not (tmp_path / "output" / "artifacts").exists()
    assert (tmp_path / "output/stages/evaluate/report/index.html").exists()


def store_adapter(folder: Path, base: Path = BASE) -> None:
    """An adapter that changes the answers, as a run publishes it."""
    save_adapter(load_with_adapter(base).model, folder, base=identify_base(open_checkpoint(base), str(base)))


@pytest.mark.slow
def test_an_adapter_answers_on_its_model(tmp_path: Path) -> None:
    store_adapter(tmp_path / "adapter")
    answers = []
    for name, model in (("plain", {}), ("adapted", {"adapter": str(tmp_path / "adapter")})):
        config = alone_config(tmp_path / name, model=model)
        result = run_evaluation("evaluate", config)
        assert result.evaluation is not None
        assert (list(result.evaluation.final), result.evaluation.baseline) == (["colours"], {})
        answers.append([row["prediction"] for row in predictions(tmp_path / name, "evaluate", "colours")])
    assert answers[0] != answers[1]


@pytest.mark.slow
def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    store_adapter(tmp_path / "adapter")
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, other / "model.safetensors")
    model = {"source": str(other), "adapter": str(tmp_path / "adapter")}
    with pytest.raises(UserError, match="use the model that the adapter was trained on") as refused:
        run_evaluation("evaluate", alone_config(tmp_path, model=model))
    assert refused.value.reason == "AdapterMismatch"


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_preflight_names_the_missing_file_of_an_adapter(tmp_path: Path, missing: str) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in {"adapter_config.json", "adapter_model.safetensors"} - {missing}:
        (adapter / name).write_bytes(b"{}")
    with pytest.raises(UserError, match=f"{missing} is missing in {adapter}; give a folder") as refused:
        check_adapter(alone_config(tmp_path, model={"adapter": str(adapter)}))
    assert (refused.value.reason, refused.value.where) == ("FileMissing", "spec.model.adapter")


def test_any_number_of_processes_shares_the_questions(tmp_path: Path) -> None:
    config = for_this_run(alone_config(tmp_path), processes=3)
    assert (config.world_size, config.gradient_accumulation) == (3, 1)


def test_the_report_of_an_evaluation_that_is_not_done_says_so(tmp_path: Path) -> None:
    record = Record(alone_config(tmp_path))
    assert banner(record, compare(record))[:2] == ("open", "Evaluation is not finished")

"""A model that several processes hold together answers as one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden import load
from internvl_api.run_config import RunConfig
from internvl_trainer.model.adapter_files import save_adapter
from internvl_trainer.model.adapters import LoraSettings, apply_method
from internvl_trainer.model.trained_weights import OTHER_WEIGHTS
from internvl_trainer.stages.score import run
from safetensors.torch import save_file
from trainer.contexts import context_of
from trainer.evaluate.shard_worker import ONES_OF_EACH, SIZES, answers
from trainer.evaluations import evaluation_config, predictions, run_evaluation, write_coco
from trainer.runs import write_config
from trainer.two_ranks import run_on_ranks

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("shard_worker.py")
RANKS = 4
ROWS = 34  # two chunks, one for each of two models


def store_adapter(kind: str, folder: Path) -> None:
    """An adapter on both towers that changes answers, with a norm and a matrix of the decoder that learned whole."""
    model = load(kind).model
    down = "model.language_model.layers.0.mlp.down_proj.weight"
    others = {down: 1.1 * model.native.get_parameter(down).data, **_norm(model.native)}
    apply_method(model, "lora", lora=LoraSettings(4, 2))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    save_adapter(model, folder)
    save_file(others, folder / OTHER_WEIGHTS)


def _norm(native: torch.nn.Module) -> dict[str, torch.Tensor]:
    name = "model.language_model.norm.weight"
    return {name: 1.5 * native.get_parameter(name).data}


def captions(folder: Path, output: Path) -> RunConfig:
    task = {"task": "caption-coco", "annotation": str(folder / "captions.json"), "maxNewTokens": 6, "minNewTokens": 3}
    return evaluation_config(output, {"coco": task})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes, started once, left for each kind of model, and of an evaluation on two models."""
    folder = tmp_path_factory.mktemp("sharded")
    for kind in ONES_OF_EACH:
        store_adapter(kind, folder / kind / "adapter")
    write_coco(folder, ROWS)
    write_config(captions(folder, folder), folder)
    return run_on_ranks(RANKS, WORKER, folder, [*ONES_OF_EACH, "stage"])


@pytest.mark.parametrize("kind", ONES_OF_EACH)
def test_every_rank_answers_as_one_process(folder: Path, kind: str) -> None:
    """The base model and one with an adapter, on two and on four processes: with fewer key-value heads than these."""
    alone = answers(kind, folder / kind / "adapter")
    assert alone["base"] != alone["adapted"]
    assert len(set(alone["base"])) > 1
    wanted = {str(size): alone for size in SIZES}
    assert [json.loads((folder / kind / f"answers-{rank}.json").read_text()) for rank in range(RANKS)] == [wanted] * 4


def test_two_models_on_four_processes_evaluate_as_one_process(folder: Path, tmp_path: Path) -> None:
    alone = captions(folder, tmp_path)
    run_evaluation("baseline-evaluate", alone)
    assert predictions(folder, "baseline-evaluate", "coco") == predictions(tmp_path, "baseline-evaluate", "coco")
    one, several = (run(context_of(each, "baseline-score")) for each in (alone, captions(folder, folder)))
    assert one.evaluation is not None
    assert set(one.evaluation.baseline["coco"]) >= {"CIDEr", "METEOR"}
    assert (one.message, one.evaluation) == (several.message, several.evaluation)
    scored = predictions(folder, "baseline-score", "coco")
    assert scored == predictions(tmp_path, "baseline-score", "coco")
    assert [{**row, "scores": {}} for row in scored] == [
        {**row, "scores": {}} for row in predictions(folder, "baseline-evaluate", "coco")
    ]

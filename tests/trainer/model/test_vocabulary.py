"""model.resizeEmbeddings: a tokenizer with more ids than the model has rows gets them, and they learn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden import KINDS, checkpoint
from internvl_api.constants import ExitCode
from internvl_trainer.distributed import Group
from internvl_trainer.errors import UserError
from internvl_trainer.model.checkpoint_source import open_checkpoint
from internvl_trainer.model.convert_checkpoint import convert_checkpoint
from internvl_trainer.model.load import LoadedModel, load_chat_model
from internvl_trainer.model.tokenizer import load_tokenizer
from internvl_trainer.model.vocabulary import grow_rows
from internvl_trainer.stages.merge import run as merge
from internvl_trainer.stages.preflight import check_model
from internvl_trainer.train.export import export_model
from safetensors.torch import load_file
from trainer.contexts import context_of
from trainer.runs import environment, make_config, started, write_config

NEW = 3


def extended(kind: str, folder: Path) -> Path:
    """A golden checkpoint whose tokenizer has NEW tokens more than its embedding has rows."""
    base = Path(shutil.copytree(checkpoint(kind), folder, ignore=shutil.ignore_patterns("*.npz")))
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens([f"<place-{number}>" for number in range(rows_of(base) - len(tokenizer) + NEW)])
    tokenizer.save_pretrained(base)
    return base


def rows_of(base: Path) -> int:
    rows: int = json.loads((base / "config.json").read_text())["llm_config"]["vocab_size"]
    return rows


def loaded(base: Path, **options: bool) -> LoadedModel:
    return load_chat_model(base, dtype=torch.float32, **options)  # type: ignore[arg-type]


def matrices(model: LoadedModel) -> dict[str, torch.Tensor]:
    native = model.model.native
    return {"input": native.model.language_model.embed_tokens.weight, "output": native.lm_head.weight}


@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_are_the_mean_of_the_old_ones(kind: str, tmp_path: Path) -> None:
    base = extended(kind, tmp_path / "base")
    old, grown = matrices(loaded(base)), matrices(loaded(base, resize_embeddings=True))
    for name, matrix in old.items():
        rows = rows_of(base)
        assert grown[name].shape == (rows + NEW, matrix.shape[1])
        assert torch.equal(grown[name][:rows], matrix)
        assert torch.equal(grown[name][rows:], matrix.mean(dim=0).expand(NEW, -1))


def test_a_mean_in_bf16_is_rounded_once() -> None:
    matrix = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(grow_rows(matrix, 1001)[1000], matrix.float().mean(dim=0).bfloat16())


def test_a_tokenizer_that_fits_changes_nothing() -> None:
    plain, asked = loaded(checkpoint("qwen2")), loaded(checkpoint("qwen2"), resize_embeddings=True)
    assert plain.vocabulary == asked.vocabulary
    assert all(torch.equal(matrix, matrices(asked)[name]) for name, matrix in matrices(plain).items())


def test_preflight_names_the_setting_and_then_passes(tmp_path: Path) -> None:
    base = extended("qwen2", tmp_path / "base")
    with pytest.raises(UserError, match=r"3 tokens have no row; set model\.resizeEmbeddings to true") as refused:
        check_model(make_config("/out", str(base)))
    assert refused.value.reason == "VocabularyTooLarge"
    check_model(make_config("/out", str(base), model={"source": str(base), "resizeEmbeddings": True}))


def test_other_shapes_are_still_refused(tmp_path: Path) -> None:
    base = extended("qwen2", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["llm_config"]["hidden_size"] *= 2
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as refused:
        loaded(base, resize_embeddings=True)
    assert refused.value.reason == "ShapeMismatch"


@pytest.mark.parametrize("kind", ["qwen2", "internlm2", "phi3"])
def test_the_export_is_a_whole_model_in_both_formats(kind: str, tmp_path: Path) -> None:
    base = extended(kind, tmp_path / "base")
    grown = loaded(base, resize_embeddings=True)
    config = make_config("/out", str(base), model={"source": str(base), "resizeEmbeddings": True})
    group = Group(0, 1, 0, torch.device("cpu"), control=None)
    engine = SimpleNamespace(module=grown.model)
    list(export_model(engine, grown, open_checkpoint(base), tmp_path / "out", config, group))
    assert rows_of(tmp_path / "out") == rows_of(base) + NEW
    again = loaded(tmp_path / "out")
    assert all(torch.equal(matrix, matrices(again)[name]) for name, matrix in matrices(grown).items())
    convert_checkpoint(tmp_path / "out", tmp_path / "hf", "hf")
    assert all(torch.equal(matrix, matrices(loaded(tmp_path / "hf"))[name]) for name, matrix in matrices(grown).items())
    assert open_checkpoint(tmp_path / "hf").config.text_config.vocab_size == rows_of(base) + NEW


@pytest.mark.slow
def test_new_rows_learn_under_zero_3_and_are_merged(tmp_path: Path) -> None:
    base = extended("qwen2", tmp_path / "base")
    turns = [[("human", "where?"), ("gpt", f"at <place-{number}>")] for number in range(NEW)]
    rows = [{"conversations": [{"from": role, "value": text} for role, text in row]} for row in turns]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    config = make_config(
        str(tmp_path / "out"),
        model={"source": str(base), "resizeEmbeddings": True},
        data={"train": {"golden": {"annotation": str(tmp_path / "rows.jsonl")}}},
        training={"maxSteps": 3, "zeroStage": 3},
        merge={"formats": ["hf"]},
    )
    command = ["train", "--config", str(write_config(config, tmp_path))]
    with started(command, environment(tmp_path), tmp_path / "result") as run:
        assert run.wait() == ExitCode.OK, run.output
    trained = tmp_path / "out/stages/train/model"
    assert rows_of(trained) == rows_of(base) + NEW
    learned = load_file(trained / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert len(learned[rows_of(base) :].unique(dim=0)) == NEW, "each new token has a row of its own"
    merge(context_of(config, "merge"))
    assert torch.equal(matrices(loaded(tmp_path / "out/stages/merge/model-hf"))["input"], learned)

"""What training writes goes by the format of its base model, also for one in transformers' own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden import checkpoint
from internvl_trainer.distributed import Group
from internvl_trainer.model.checkpoint_source import open_checkpoint
from internvl_trainer.model.convert_checkpoint import convert_checkpoint
from internvl_trainer.model.load import LoadedModel, load_chat_model
from internvl_trainer.model.tokenizer import load_tokenizer
from internvl_trainer.train import export
from safetensors.torch import load_file, save_file
from trainer.contexts import Alone
from trainer.runs import make_config
from trainer.train.held_tensors import watched_export
from transformers import AutoModelForImageTextToText

SMALL = 60_000  # bytes of a shard; the checkpoints have 13 of them
INDEX = "model.safetensors.index.json"


def converted(folder: Path, kind: str = "qwen2", shard_size: int | None = None) -> Path:
    """A base as `convert --to hf` writes it: transformers' current names, upstream's files beside it."""
    convert_checkpoint(checkpoint(kind), folder, "hf", shard_size=shard_size)
    return folder


def published(folder: Path, shard_size: int | None = None) -> Path:
    """A base like OpenGVLab's -hf repositories: save_pretrained's names, nothing of upstream's."""
    made = converted(folder.with_name("converted"))
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("upstream", "*.safetensors"))
    native = load_chat_model(made, dtype=torch.float32).model.native
    native.save_pretrained(folder, max_shard_size=shard_size or "1GB")
    return folder


def trained(base: Path, **options: Any) -> LoadedModel:
    """The base with other values in every parameter."""
    loaded = load_chat_model(base, dtype=torch.float32, **options)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(1.0)
    return loaded


def exported(loaded: LoadedModel, base: Path, target: Path, group: Group, **sections: Any) -> list[Path]:
    engine, config = SimpleNamespace(module=loaded.model), make_config("/out", **sections)
    return list(export.export_model(engine, loaded, open_checkpoint(base), target, config, group))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def rank_of(rank: int, world_size: int) -> Group:
    return Group(rank, world_size, 0, torch.device("cpu"), control=None)


def test_a_model_trained_from_the_hf_form_is_one_and_still_goes_back(tmp_path: Path) -> None:
    base = converted(tmp_path / "base", "internlm2")
    loaded = trained(base)
    assert exported(loaded, base, tmp_path / "tuned", Alone(), image={"maxDynamicPatch": 3})
    convert_checkpoint(tmp_path / "tuned", tmp_path / "back", "upstream")
    wanted = loaded.model.native.state_dict()
    for directory in ("tuned", "back"):
        found = load_chat_model(tmp_path / directory, dtype=torch.float32).model.native.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["model_type"] == "internvl"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["max_dynamic_patch"] == 3


@pytest.mark.parametrize("shard_size", [None, SMALL])
def test_a_published_base_comes_out_as_save_pretrained_would_write_it(tmp_path: Path, shard_size: int | None) -> None:
    base = published(tmp_path / "base", shard_size)
    assert (base / INDEX).exists() == (shard_size is not None)
    loaded = trained(base)
    exported(loaded, base, tmp_path / "out", Alone())
    loaded.model.native.save_pretrained(tmp_path / "wanted")
    before, after, wanted = files(base), files(tmp_path / "out"), files(tmp_path / "wanted")
    assert after.keys() == before.keys()
    assert after["config.json"] == wanted["config.json"]
    for name in before.keys() - {"config.json"}:
        assert name.endswith(".safetensors") or after[name] == before[name]
    found, values = weights(tmp_path / "out"), weights(tmp_path / "wanted")
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in values.items())
    if shard_size is not None:
        named = json.loads(after[INDEX])["weight_map"]
        assert all(name in load_file(tmp_path / "out" / file) for name, file in named.items())


@pytest.mark.parametrize("settings", [{"do_sample": True, "temperature": 0.3, "eos_token_id": [5, 7]}, None])
def test_the_settings_of_generation_are_those_of_the_base(tmp_path: Path, settings: dict[str, Any] | None) -> None:
    base = published(tmp_path / "base")
    path = base / "generation_config.json"
    path.unlink()
    if settings is not None:
        path.write_text(json.dumps(settings), encoding="utf-8")
    exported(trained(base), base, tmp_path / "out", Alone())
    written = tmp_path / "out" / path.name
    assert (json.loads(written.read_text(encoding="utf-8")) if written.exists() else None) == settings


@pytest.mark.parametrize("make", [published, converted])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_every_trained_tensor(tmp_path: Path, make: Callable[..., Path], dtype: torch.dtype) -> None:
    base = make(tmp_path / "base", shard_size=SMALL)
    loaded = trained(base)
    loaded.model.to(dtype)
    exported(loaded, base, tmp_path / "out", Alone())
    model, problems = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(problems.values()), problems
    assert model.dtype == dtype
    found, wanted = model.state_dict(), loaded.model.native.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_added_rows_of_the_vocabulary_are_in_weights_and_configuration(tmp_path: Path) -> None:
    base = published(tmp_path / "base", SMALL)
    tokenizer, rows = load_tokenizer(base), load_chat_model(base).vocabulary
    tokenizer.add_tokens([f"<place-{number}>" for number in range(rows - len(tokenizer) + 3)])
    tokenizer.save_pretrained(base)
    loaded = trained(base, resize_embeddings=True)
    exported(loaded, base, tmp_path / "out", Alone(), model={"source": str(base), "resizeEmbeddings": True})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == rows + 3
    again = load_chat_model(tmp_path / "out", dtype=torch.float32).model.native.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.model.native.state_dict().items())


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_writes_shards_of_its_own(tmp_path: Path, world_size: int) -> None:
    base = published(tmp_path / "base", SMALL)
    loaded = trained(base)
    exported(loaded, base, tmp_path / "alone", Alone())
    wanted, shards = files(tmp_path / "alone"), sorted(path.name for path in base.glob("*.safetensors"))
    found: dict[str, bytes] = {}
    for rank in range(world_size):
        written = exported(loaded, base, tmp_path / f"{rank}", rank_of(rank, world_size))
        assert [path.name for path in written if path.suffix == ".safetensors"] == shards[rank::world_size]
        assert not found.keys() & files(tmp_path / f"{rank}").keys(), "no file comes from two ranks"
        found |= files(tmp_path / f"{rank}")
    assert found == wanted


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_holds_one_shard_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Also where each shard has tensors from the model's beginning to its end."""
    base = published(tmp_path / "base")
    scatter(base, 4)
    loaded, held = trained(base), watched_export(monkeypatch)
    exported(loaded, base, tmp_path / "out", rank_of(rank, 2))
    shards = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in base.glob("*.safetensors")]
    largest = max(parameter.nbytes for parameter in loaded.model.parameters())
    assert 0 < held.peak <= max(shards) + largest
    assert held.peak < sum(shards) / 2


def scatter(base: Path, count: int) -> None:
    """Deal the tensors of a base in one file out to `count` files, with an index."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    shards = {f"model-{n + 1:05d}-of-{count:05d}.safetensors": sorted(tensors)[n::count] for n in range(count)}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, base / file, metadata={"format": "pt"})
    weight_map = {name: file for file, members in shards.items() for name in members}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

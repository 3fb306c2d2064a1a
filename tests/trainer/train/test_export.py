"""A full fine-tune comes out as the base came in: the same shards, the same other files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from internvl_trainer.distributed import Group
from internvl_trainer.model.adapters import LoraSettings, apply_method, is_adapter, lora_config
from internvl_trainer.model.checkpoint_source import open_checkpoint
from internvl_trainer.model.load import load_chat_model
from internvl_trainer.model.parameters import CPU
from internvl_trainer.model.trained_weights import OTHER_WEIGHTS
from internvl_trainer.train.components import lora_settings
from internvl_trainer.train.export import export_adapter, export_model
from safetensors.torch import load_file, save_file
from trainer.contexts import Alone
from trainer.runs import GOLDEN, make_config
from trainer.train.held_tensors import watched_export

DERIVED = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The qwen2 checkpoint in two shards, with a buffer that old checkpoints have, and a pickle beside them."""
    folder = tmp_path / "base"
    shutil.copytree(GOLDEN / "checkpoints" / "qwen2", folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    tensors[DERIVED] = torch.ones(3)
    shards = {
        "model-00001-of-00002.safetensors": [*names[::2], DERIVED],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "README.md").write_text("card")
    return folder


def export(base: Path, target: Path, change: Any = None, rank: int = 0, world_size: int = 1) -> dict[str, bytes]:
    """Name to content of what a rank exports, each file taken and deleted as it comes."""
    loaded = load_chat_model(base, dtype=torch.float32)
    if change is not None:
        change(loaded.model)
    engine = SimpleNamespace(module=loaded.model)
    group = Group(rank, world_size, 0, torch.device("cpu"), control=None)
    files = {}
    for path in export_model(engine, loaded, open_checkpoint(base), target, make_config("/out"), group):
        files[path.relative_to(target).as_posix()] = path.read_bytes()
        path.unlink()
    return files


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_exports_shards_of_its_own(base: Path, tmp_path: Path, world_size: int) -> None:
    ranks = [export(base, tmp_path / f"{rank}", rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sum(len(files) for files in ranks) == len(set().union(*ranks)), "no file comes from two ranks"
    assert {name: data for files in ranks for name, data in files.items()} == export(base, tmp_path / "alone")
    weights = [sum(name.endswith(".safetensors") for name in files) for files in ranks]
    assert weights == [1, 1, 0][:world_size]


def test_untouched_weights_come_out_bit_for_bit(base: Path, tmp_path: Path) -> None:
    files = export(base, tmp_path / "out")
    names = {path.name for path in base.iterdir() if path.suffix not in (".bin", ".npz")}
    assert set(files) == names
    (tmp_path / "back").mkdir()
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (tmp_path / "back" / file).write_bytes(files[file])
        before, after = load_file(base / file), load_file(tmp_path / "back" / file)
        assert sorted(before) == sorted(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
    for name in names - {"config.json"}:
        if not name.endswith(".safetensors"):
            assert files[name] == (base / name).read_bytes()


def test_the_configuration_says_how_training_cut_tiles(base: Path, tmp_path: Path) -> None:
    config = json.loads(export(base, tmp_path / "out")["config.json"])
    before = json.loads((base / "config.json").read_text())
    changed = {name for name in config if config[name] != before.get(name)}
    assert changed <= {
        "max_dynamic_patch", "min_dynamic_patch", "dynamic_image_size", "use_thumbnail", "template", "force_image_size"
    }  # fmt: skip
    assert (config["max_dynamic_patch"], config["use_thumbnail"]) == (6, True)


def test_a_changed_weight_is_in_its_shard(base: Path, tmp_path: Path) -> None:
    def change(model: Any) -> None:
        with torch.no_grad():
            model.native.lm_head.weight.zero_()

    files = export(base, tmp_path / "out", change)
    (tmp_path / "shard").write_bytes(
        files[json.loads(files["model.safetensors.index.json"])["weight_map"]["language_model.lm_head.weight"]]
    )
    assert float(load_file(tmp_path / "shard")["language_model.lm_head.weight"].abs().max()) == 0.0


def test_what_learns_beside_an_adapter_is_written_a_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter on the vision tower leaves the whole language model to learn."""
    loaded, held = load_chat_model(GOLDEN / "checkpoints" / "qwen2", dtype=torch.float32), watched_export(monkeypatch)
    apply_method(loaded.model, "lora", lora=LoraSettings(vision_rank=1))
    learning = {name: parameter for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    others = {name.removeprefix("native."): tensor for name, tensor in learning.items() if not is_adapter(name)}
    engine = SimpleNamespace(module=loaded.model)
    written = list(export_adapter(engine, loaded.model, tmp_path / "out", Alone(), None))
    assert [path.name for path in written] == ["adapter_config.json", "adapter_model.safetensors", OTHER_WEIGHTS]
    found = load_file(tmp_path / "out" / OTHER_WEIGHTS)
    assert found.keys() == others.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in others.items())
    save_file({name: tensor.detach() for name, tensor in others.items()}, tmp_path / "at-once", {"format": "pt"})
    assert (tmp_path / "out" / OTHER_WEIGHTS).read_bytes() == (tmp_path / "at-once").read_bytes()
    of_adapter = sum(tensor.nbytes for name, tensor in learning.items() if is_adapter(name))
    assert held.peak <= of_adapter + 2 * max(tensor.nbytes for tensor in others.values())
    assert not list(export_adapter(engine, loaded.model, tmp_path / "other", Group(1, 2, 0, CPU, control=None), None))
    assert not (tmp_path / "other").exists()


def test_each_tower_has_its_own_alpha() -> None:
    lora = {"languageRank": 4, "languageAlpha": 6, "visionRank": 2, "visionAlpha": 3, "dropout": 0.0}
    settings = lora_settings(make_config("/out", method="lora", lora=lora))
    assert settings is not None
    config = lora_config(load_chat_model(GOLDEN / "checkpoints" / "qwen2").model, settings)
    assert (config.r, config.lora_alpha) == (4, 6)
    assert (list(config.rank_pattern.values()), list(config.alpha_pattern.values())) == ([2], [3])

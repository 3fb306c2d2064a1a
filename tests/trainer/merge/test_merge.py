"""The merge stage: what it writes is the base plus what was trained, complete, checked, and there only when whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import ROUNDING, assert_close, assert_each_close
from golden import CASES, KINDS, sample
from internvl_api.run_config import RunConfig
from internvl_trainer.artifacts.manifest import check_sizes, read_manifest
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.data.collate import collate
from internvl_trainer.model.adapter_files import load_adapter
from internvl_trainer.model.load import load_chat_model
from internvl_trainer.stages.merge.chat import TOLERANCES, merge_chat_model
from safetensors.torch import load_file
from trainer.contexts import context_of
from trainer.merge.finished import SHARDS, expected_weights, golden_base, trained_adapter, whole_logits
from transformers import AutoModelForImageTextToText

pytestmark = pytest.mark.slow

INDEX = "model.safetensors.index.json"
ADAPTERS = [
    pytest.param({"languageRank": 4}, id="lora"),
    pytest.param({"languageRank": 4, "visionRank": 2}, id="lora on both"),
    pytest.param({"languageRank": 0, "visionRank": 2}, id="vision lora"),
    pytest.param({"languageRank": 4, "visionRank": 2, "dora": True}, id="dora"),
]
BOTH = {"formats": ["upstream", "hf"]}


def run(config: RunConfig) -> Path:
    """The stage's folder, after it."""
    result = merge_chat_model(context_of(config, "merge"))
    assert (result.outcome, result.reason) == ("succeeded", "Merged")
    return Path(config.output) / "stages/merge"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("lora", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_base_plus_what_was_trained(kind: str, lora: dict[str, Any], tmp_path: Path) -> None:
    base = golden_base(kind, tmp_path / "base")
    merged = run(trained_adapter(base, tmp_path / "out", lora=lora)) / "model"
    expected = expected_weights(base, tmp_path / "out/stages/train/adapter")
    found, before = weights(merged), weights(base)
    assert found.keys() == before.keys()
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed == {name for name in expected if not torch.equal(expected[name], before[name].double())}
    assert_each_close(found, expected)
    for file in base.glob("*.safetensors"):  # the same shards
        assert load_file(merged / file.name).keys() == load_file(file).keys()


@pytest.mark.parametrize("case", CASES)
def test_all_forms_compute_what_the_adapter_does(case: str, tmp_path: Path) -> None:
    kind = case.split("/")[0]
    base = golden_base(kind, tmp_path / "base")
    merged = run(trained_adapter(base, tmp_path / "out", merge=BOTH))
    batch = collate([sample(case, 0)])
    wanted = adapter_logits(base, tmp_path / "out/stages/train/adapter", batch)
    assert not torch.allclose(whole_logits(base, batch), wanted, atol=0.1)
    for name in ("model", "model-hf"):
        assert_close(whole_logits(merged / name, batch), wanted)
    plain = AutoModelForImageTextToText.from_pretrained(merged / "model-hf", dtype=torch.float32)
    theirs = plain.state_dict()
    ours = load_chat_model(merged / "model", dtype=torch.float32).model.native.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


@torch.no_grad()
def adapter_logits(base: Path, adapter: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the base with the adapter on it, by PEFT, and the projector that learned."""
    loaded = load_chat_model(base, dtype=torch.float32)
    others = load_file(adapter / "trained_weights.safetensors")
    assert loaded.model.native.load_state_dict(others, strict=False).unexpected_keys == []
    load_adapter(loaded.model, adapter)
    output = loaded.model.eval()(**batch, return_logits=True)
    assert output.logits is not None
    return output.logits


def test_the_directory_is_complete(tmp_path: Path) -> None:
    base = golden_base("internlm2", tmp_path / "base")
    code = b"raise SystemExit('remote code ran')\r\n"
    (base / "modeling_internvl_chat.py").write_bytes(code)
    (base / "pytorch_model.bin").write_bytes(b"a pickle")
    run_settings = {"model": {"template": "internvl2_5"}, "image": {"maxDynamicPatch": 4, "thumbnail": False}}
    merged = run(trained_adapter(base, tmp_path / "out", merge=BOTH, **run_settings))
    names = {path.name for path in base.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in (merged / "model").iterdir()} == names
    untouched = names - {"config.json", INDEX} - {path.name for path in base.glob("*.safetensors")}
    assert {"modeling_internvl_chat.py", "generation_config.json", "tokenizer.model"} < untouched
    for name in untouched:
        assert (merged / "model" / name).read_bytes() == (base / name).read_bytes()
        assert (merged / "model-hf/upstream" / name).read_bytes() == (base / name).read_bytes()
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (merged / "model", base))
    assert {name: config[name] for name in config if config[name] != before.get(name)} == {
        "template": "internvl2_5",
        "max_dynamic_patch": 4,
        "use_thumbnail": False,
    }
    assert json.loads((merged / "model-hf/upstream/config.json").read_text()) == config
    index = json.loads((merged / "model" / INDEX).read_text())
    assert index["weight_map"] == json.loads((base / INDEX).read_text())["weight_map"]
    assert len(set(index["weight_map"].values())) == SHARDS


def test_the_manifest_says_what_is_there_and_how_it_was_checked(tmp_path: Path) -> None:
    base = golden_base("qwen2", tmp_path / "base")
    config = trained_adapter(base, tmp_path / "out", merge=BOTH)
    merged = run(config)
    storage = open_storage(config.output, field="spec.output")
    manifest = read_manifest(storage, "stages/merge")
    assert manifest is not None
    check_sizes(storage, "stages/merge", manifest)
    there = {path.relative_to(merged).as_posix() for path in merged.rglob("*") if path.is_file()}
    assert there == {file.path for file in manifest.files} | {"manifest.json"}
    assert manifest.extra["artifacts"] == {"model": f"{merged}/model", "modelHf": f"{merged}/model-hf"}
    for check in manifest.extra["checks"].values():
        assert check["row"] == f"{config.data.train['golden'].annotation}:1"
        assert check["difference"] < ROUNDING < 0.1 < check["moved"]
        assert check["tolerance"] == TOLERANCES[torch.float32]

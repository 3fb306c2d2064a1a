"""Outputs whose train stage is done, as training leaves them, and what the merged weights then have to be.

The expectations are computed here in upstream's own layout, from the adapter's file, without the code under test.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from golden import checkpoint
from internvl_api.run_config import RunConfig
from internvl_trainer.artifacts.fingerprint import fingerprint
from internvl_trainer.artifacts.manifest import commit, upload_files
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.model.adapter_files import save_adapter
from internvl_trainer.model.adapters import apply_method, is_adapter
from internvl_trainer.model.base_identity import describe_base
from internvl_trainer.model.load import load_chat_model
from internvl_trainer.train.components import lora_settings
from safetensors.torch import load_file, save_file
from trainer.runs import make_config

RANKS = {"languageRank": 4, "visionRank": 2}
SHARDS = 3


def golden_base(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A golden checkpoint in a few shards, free to change, with files beside the weights that a merge must carry."""
    base = Path(shutil.copytree(checkpoint(kind), folder, ignore=shutil.ignore_patterns("*.npz")))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").unlink()
    names = sorted(tensors, key=lambda name: name[::-1])  # parts of one layer lie in several files
    files = {
        name: f"model-{1 + place * SHARDS // len(names):05}-of-{SHARDS:05}.safetensors"
        for place, name in enumerate(names)
    }
    for file in sorted(set(files.values())):
        own = {name: tensors[name] for name in names if files[name] == file}
        save_file(own, base / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": files}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 428]}')
    return base


def trained_adapter(base: Path, output: Path, *, seed: int = 5, scale: float = 0.1, **sections: Any) -> RunConfig:
    """An output whose train stage exported an adapter that does something, and a projector that learned."""
    settings: dict[str, Any] = {"method": "lora", "lora": RANKS, "merge": {"formats": ["upstream"]}}
    config = make_config(str(output), str(base), **(settings | sections))
    tile_size = config.image.tile_size
    loaded = load_chat_model(base, dtype=torch.float32, image_size=tile_size)
    apply_method(loaded.model, "lora", lora=lora_settings(config), seed=1)
    export = output.with_name(f"{output.name}-export")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in loaded.model.named_parameters():
            if is_adapter(name):
                parameter.copy_(parameter.abs() * 1.1 if "magnitude" in name else torch.randn_like(parameter) * scale)
        save_adapter(loaded.model, export)
        projector = loaded.model.projector.linear_1
        others = {"model.multi_modal_projector.linear_1.weight": projector.weight + 0.01}
        save_file(others, export / "trained_weights.safetensors", metadata={"format": "pt"})
    finish_training(config, {f"adapter/{path.name}": path for path in export.iterdir()})
    return config


def finish_training(config: RunConfig, files: dict[str, Path]) -> None:
    """Store what training made, and its manifest."""
    storage = open_storage(config.output, field="spec.output")
    described = upload_files(storage, "stages/train", files)
    kind = "adapter" if config.method == "lora" else "model"
    commit(storage, "stages/train", described, fingerprint(config), kind=kind, steps=10, base=describe_base(config))


def expected_weights(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """base + scaling * B @ A, or DoRA's length of it, under upstream's names and in its fused layout, in float64."""
    config = json.loads((base / "config.json").read_text())["llm_config"]
    files = sorted(base.glob("*.safetensors"))
    tensors = {name: tensor.double() for file in files for name, tensor in load_file(file).items()}
    learned = {name: tensor.double() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    for name, tensor in load_file(adapter / "trained_weights.safetensors").items():
        module, leaf = name.removeprefix("model.multi_modal_projector.").split(".")
        tensors[f"mlp1.{_PROJECTOR[module]}.{leaf}"] = tensor.double()
    for name, weight in tensors.items():
        modules = native_modules(name)
        changes = [delta for module in modules if (delta := low_rank(learned, module)) is not None]
        if not changes:
            continue
        assert len(changes) == len(modules), f"only a part of {name} has an adapter"
        fused = weight + interleave(changes, config, is_wqkv="wqkv" in name)
        if lengths := [found for module in modules if (found := magnitude(learned, module)) is not None]:
            columns = interleave([length[:, None] for length in lengths], config, is_wqkv="wqkv" in name)
            fused = fused / fused.norm(dim=1, keepdim=True) * columns
        tensors[name] = fused
    return tensors


_PROJECTOR = {"layer_norm": 0, "linear_1": 1, "linear_2": 3}
_INTERNLM2 = {"attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj"}
_INTERNLM2 |= {"feed_forward.w2": "mlp.down_proj"}


def native_modules(upstream: str) -> list[str]:
    """The native model's modules that one weight of upstream's is made of."""
    name = upstream.removesuffix(".weight")
    if found := re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.+)", name):
        layer = f"model.vision_tower.encoder.layer.{found[1]}"
        if found[2] == "attn.qkv":
            return [f"{layer}.attention.{part}_proj" for part in "qkv"]
        return [f"{layer}.attention.projection_layer" if found[2] == "attn.proj" else f"{layer}.{found[2]}"]
    if found := re.fullmatch(r"language_model\.model\.layers\.(\d+)\.(.+)", name):
        layer = f"model.language_model.layers.{found[1]}"
        if found[2] == "attention.wqkv":
            return [f"{layer}.self_attn.{part}_proj" for part in "qkv"]
        return [f"{layer}.{_INTERNLM2.get(found[2], found[2])}"]
    return [name]


def low_rank(learned: Mapping[str, torch.Tensor], module: str) -> torch.Tensor | None:
    """scaling * B @ A; alpha is twice the rank, so scaling is 2."""
    key = f"base_model.model.{module}"
    if f"{key}.lora_A.weight" not in learned:
        return None
    return 2.0 * learned[f"{key}.lora_B.weight"] @ learned[f"{key}.lora_A.weight"]


def magnitude(learned: Mapping[str, torch.Tensor], module: str) -> torch.Tensor | None:
    return next((learned[name] for name in learned if f".{module}.lora_magnitude_vector" in name), None)


def interleave(parts: list[torch.Tensor], config: Mapping[str, int], *, is_wqkv: bool) -> torch.Tensor:
    """Rows one part after the other; wqkv's for each KV head: its query heads, its key, its value."""
    if not is_wqkv:
        return torch.cat(parts)
    query, key, value = parts
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width, each = len(query) // heads, heads // kv_heads
    rows: list[torch.Tensor] = []
    for group in range(kv_heads):
        own = slice(group * width, (group + 1) * width)
        rows += [query[group * each * width : (group + 1) * each * width], key[own], value[own]]
    return torch.cat(rows)


def whole_logits(directory: Path, batch: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """Of a checkpoint loaded as a whole."""
    with torch.no_grad():
        output = load_chat_model(directory, **({"dtype": torch.float32} | options)).model.eval()(
            **batch, return_logits=True
        )
    assert output.logits is not None
    return output.logits

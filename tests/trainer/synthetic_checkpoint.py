"""A checkpoint of any size with random weights, and the golden model's tokenizer and vision tower."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from golden import checkpoint
from safetensors.torch import load_file, save_file

HEADS, KV_HEADS = 16, 8
_LANGUAGE = "language_model.model."


@dataclass(frozen=True)
class Size:
    """Dimensions of the language model.

    Attributes:
        shards: weight files; a divisor of `layers`.
    """

    hidden: int
    intermediate: int
    layers: int
    shards: int


def write_checkpoint(folder: Path, size: Size) -> int:
    """Write a Qwen2 checkpoint in fp32 and upstream's format; the bytes of its weights.

    One shard is in memory at a time.
    """
    torch.manual_seed(0)
    small = checkpoint("qwen2")
    shutil.copytree(small, folder, ignore=shutil.ignore_patterns("*.npz", "*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["hidden_size"] = size.hidden
    config["llm_config"] |= {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    golden = load_file(small / "model.safetensors")
    each, weight_map, total = size.layers // size.shards, {}, 0
    for shard in range(size.shards):
        tensors = {} if shard else _outside_layers(golden, config["llm_config"]["vocab_size"], size)
        for layer in range(shard * each, (shard + 1) * each):
            tensors |= _layer(layer, size)
        file = f"model-{shard + 1:05d}-of-{size.shards:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def _outside_layers(golden: dict[str, torch.Tensor], vocabulary: int, size: Size) -> dict[str, torch.Tensor]:
    merged = len(golden["mlp1.0.weight"])
    kept = {name: tensor for name, tensor in golden.items() if name.startswith(("vision_model.", "mlp1.0."))}
    return kept | {
        "mlp1.1.weight": _normal(size.hidden, merged),
        "mlp1.1.bias": torch.zeros(size.hidden),
        "mlp1.3.weight": _normal(size.hidden, size.hidden),
        "mlp1.3.bias": torch.zeros(size.hidden),
        f"{_LANGUAGE}embed_tokens.weight": torch.randn(vocabulary, size.hidden),
        f"{_LANGUAGE}norm.weight": torch.ones(size.hidden),
        "language_model.lm_head.weight": _normal(vocabulary, size.hidden),
    }


def _layer(number: int, size: Size) -> dict[str, torch.Tensor]:
    prefix, keys = f"{_LANGUAGE}layers.{number}.", size.hidden // HEADS * KV_HEADS
    tensors = {
        "input_layernorm.weight": torch.ones(size.hidden),
        "post_attention_layernorm.weight": torch.ones(size.hidden),
        "self_attn.q_proj.weight": _normal(size.hidden, size.hidden),
        "self_attn.q_proj.bias": torch.zeros(size.hidden),
        "self_attn.k_proj.weight": _normal(keys, size.hidden),
        "self_attn.k_proj.bias": torch.zeros(keys),
        "self_attn.v_proj.weight": _normal(keys, size.hidden),
        "self_attn.v_proj.bias": torch.zeros(keys),
        "self_attn.o_proj.weight": _normal(size.hidden, size.hidden),
        "mlp.gate_proj.weight": _normal(size.intermediate, size.hidden),
        "mlp.up_proj.weight": _normal(size.intermediate, size.hidden),
        "mlp.down_proj.weight": _normal(size.hidden, size.intermediate),
    }
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _normal(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs) / inputs**0.5

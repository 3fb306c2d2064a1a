"""Measures the memory of a merge. It asserts no limits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from golden import checkpoint
from internvl_api.quantity import gib
from internvl_api.run_config import RunConfig
from internvl_trainer.model.adapter_files import save_adapter
from internvl_trainer.model.adapters import apply_method, is_adapter
from internvl_trainer.model.chat_model import ChatModel
from internvl_trainer.model.checkpoint_format import native_config, read_architecture
from internvl_trainer.train.components import lora_settings
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from trainer.merge.finished import finish_training
from trainer.runs import make_config, write_config
from transformers import InternVLForConditionalGeneration

# The language model of InternVL2-2B with two more layers.
LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY, SHARDS, RANK = 26, 2048, 8192, 92553, 4, 128
PREFIX = "language_model.model.layers."

# A separate process; its memory after merging a tiny model is the baseline. (VmHWM starts at zero; getrusage's peak
# survives exec, so it would include the parent, which creates the checkpoint.)
_MEASURE = """
import re, sys, time
from pathlib import Path
from internvl_api.run_config import RunConfig
from internvl_trainer.metrics import Reporter
from internvl_trainer.run_context import open_context
from internvl_trainer.stages.merge.chat import merge_chat_model
for path in sys.argv[1:]:
    config = RunConfig.load(Path(path))
    began = time.monotonic()
    merge_chat_model(open_context("merge", config, Reporter(config.job, "merge")))
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    print(time.monotonic() - began, 1024 * int(peak[1]))
"""


def bench_merge(tmp_path: Path) -> None:
    """Merge a LoRA of rank 128 into a 4 GB checkpoint in four shards; write upstream's format, check and store it."""
    small = checkpoint("internlm2")
    large = tmp_path / "base"
    size = _grow(small, large)
    configs = [
        write_config(_trained(base, folder), folder)
        for base, folder in ((small, tmp_path / "small"), (large, tmp_path / "large"))
    ]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, configs)], capture_output=True, text=True, check=True
    )
    (_, before), (seconds, peak) = (map(float, line.split()) for line in done.stdout.splitlines()[-2:])
    largest = max(path.stat().st_size for path in large.glob("*.safetensors"))
    table = Table(title=f"Merging a LoRA of rank {RANK} into {gib(size)} of bf16 in {SHARDS} shards")
    for column in ("largest shard", "process before", "peak", "peak - process", "s"):
        table.add_column(column)
    table.add_row(*(gib(int(each)) for each in (largest, before, peak, peak - before)), f"{seconds:.0f}")
    Console().print(table)
    shutil.rmtree(tmp_path)


def _trained(base: Path, folder: Path) -> RunConfig:
    """An output with an exported adapter for the language model, as after the train stage."""
    folder.mkdir(exist_ok=True)
    lora = {"languageRank": RANK}
    config = make_config(str(folder / "out"), str(base), method="lora", lora=lora, merge={"formats": ["upstream"]})
    upstream = json.loads((base / "config.json").read_text())
    with torch.device("meta"):
        native = InternVLForConditionalGeneration(native_config(upstream, image_token_id=5))
        model = ChatModel(native, read_architecture(upstream))
        apply_method(model, "lora", lora=lora_settings(config))
    learned = {name: 0.01 * torch.randn(p.shape) for name, p in model.named_parameters() if is_adapter(name)}
    save_adapter(model, folder / "adapter", learned)
    finish_training(config, {f"adapter/{path.name}": path for path in (folder / "adapter").iterdir()})
    return config


def _grow(small: Path, large: Path) -> int:
    """Write the golden InternLM2 checkpoint with a 4 GB language model; return the bytes of its weights."""
    shutil.copytree(small, large, ignore=shutil.ignore_patterns("*.npz", "*.safetensors"))
    config = json.loads((large / "config.json").read_text())
    config["llm_config"] |= {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
    }
    (large / "config.json").write_text(json.dumps(config))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16) * 0.02

    vision = {name: tensor.bfloat16() for name, tensor in load_file(small / "model.safetensors").items()}
    vision = {name: tensor for name, tensor in vision.items() if name.startswith("vision_model.")}
    merged = config["vision_config"]["hidden_size"] * 4
    rest = vision | {
        "mlp1.0.weight": torch.ones(merged, dtype=torch.bfloat16),
        "mlp1.0.bias": torch.zeros(merged, dtype=torch.bfloat16),
        "mlp1.1.weight": normal(HIDDEN, merged),
        "mlp1.1.bias": torch.zeros(HIDDEN, dtype=torch.bfloat16),
        "mlp1.3.weight": normal(HIDDEN, HIDDEN),
        "mlp1.3.bias": torch.zeros(HIDDEN, dtype=torch.bfloat16),
        "language_model.model.tok_embeddings.weight": normal(VOCABULARY, HIDDEN),
        "language_model.model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "language_model.output.weight": normal(VOCABULARY, HIDDEN),
    }
    weight_map: dict[str, str] = {}
    size = 0
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = rest if shard == 0 else {}
        for layer in range(shard * LAYERS // SHARDS, (shard + 1) * LAYERS // SHARDS):
            tensors |= {
                f"{PREFIX}{layer}.attention.wqkv.weight": normal(2 * HIDDEN, HIDDEN),
                f"{PREFIX}{layer}.attention.wo.weight": normal(HIDDEN, HIDDEN),
                f"{PREFIX}{layer}.feed_forward.w1.weight": normal(INTERMEDIATE, HIDDEN),
                f"{PREFIX}{layer}.feed_forward.w3.weight": normal(INTERMEDIATE, HIDDEN),
                f"{PREFIX}{layer}.feed_forward.w2.weight": normal(HIDDEN, INTERMEDIATE),
                f"{PREFIX}{layer}.attention_norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
                f"{PREFIX}{layer}.ffn_norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            }
        save_file(tensors, large / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    (large / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return size

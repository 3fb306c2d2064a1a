"""A tiny InternVL2-1B-shaped checkpoint in upstream's own format (model_type internvl_chat): random, 0.7 MB."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ivft_cluster.paths import CHECKOUT
from safetensors.numpy import load_file, save_file

REFERENCE = CHECKOUT / "tests/data/golden/checkpoints/qwen2"
OUTPUT_LAYER = "language_model.lm_head.weight"
# LoRA leaves the output layer as it is. The reference's random one is so small that no hidden state could make a
# confident prediction with it: the loss would stop at 80 % of its start. Three times larger, it can.
OUTPUT_LAYER_SCALE = 3


def write_checkpoint(folder: Path) -> Path:
    """Write config, tokenizer and weights into `folder`, which must not be there yet; returns it."""
    shutil.copytree(REFERENCE, folder, ignore=shutil.ignore_patterns("*.npz", "model.safetensors", "config.json"))
    config = json.loads((REFERENCE / "config.json").read_text(encoding="utf-8"))
    # The reference's is an ordinary character, with which every answer would begin; in published models it is special.
    config["llm_config"]["bos_token_id"] = config["llm_config"]["pad_token_id"]
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = load_file(REFERENCE / "model.safetensors")
    weights[OUTPUT_LAYER] = weights[OUTPUT_LAYER] * OUTPUT_LAYER_SCALE
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

"""Tiny checkpoints in upstream's own formats: an InternVL2-1B-shaped one (0.7 MB) and an InternVL-14B-shaped one.

Both are random: what a run shows of them, it has taught them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from ivft_cluster.paths import CHECKOUT
from safetensors.numpy import load_file, save_file

REFERENCE = CHECKOUT / "tests/data/golden/checkpoints/qwen2"
OUTPUT_LAYER = "language_model.lm_head.weight"
# LoRA does not train the output layer. The reference's random weights are too small for a confident prediction, so the
# loss would stop at 80 % of its start. With three times larger weights it falls further.
OUTPUT_LAYER_SCALE = 3

RETRIEVAL_REFERENCE = CHECKOUT / "tests/data/golden-retrieval/cross-attention/checkpoint"
TOKENIZER = CHECKOUT / "tests/data/golden/checkpoints/internlm2"  # a small sentencepiece model, as InternVL-14B has
VOCABULARY = 438  # of that tokenizer, with its added tokens
VOCABULARY_LAYERS = ("qllama.model.embed_tokens.weight", "qllama.lm_head.weight")


def write_checkpoint(folder: Path) -> Path:
    """Write config, tokenizer and weights into `folder`, which must not exist yet; return it."""
    shutil.copytree(REFERENCE, folder, ignore=shutil.ignore_patterns("*.npz", "model.safetensors", "config.json"))
    config = json.loads((REFERENCE / "config.json").read_text(encoding="utf-8"))
    # In the reference it is an ordinary character that would begin every answer; published models have a special token.
    config["llm_config"]["bos_token_id"] = config["llm_config"]["pad_token_id"]
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = load_file(REFERENCE / "model.safetensors")
    weights[OUTPUT_LAYER] = weights[OUTPUT_LAYER] * OUTPUT_LAYER_SCALE
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_retrieval_checkpoint(folder: Path) -> Path:
    """The same for a retrieval model (model_type internvl), whose vocabulary is the tokenizer's."""
    folder.mkdir(parents=True)
    for path in TOKENIZER.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((RETRIEVAL_REFERENCE / "config.json").read_text(encoding="utf-8"))
    config["qllama_config"]["vocab_size"] = VOCABULARY
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    weights = load_file(RETRIEVAL_REFERENCE / "model.safetensors")
    random = np.random.default_rng(0)
    for layer in VOCABULARY_LAYERS:
        width, spread = weights[layer].shape[1], weights[layer].std()
        weights[layer] = random.normal(0, spread, (VOCABULARY, width)).astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

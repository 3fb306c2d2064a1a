"""Models of the catalogue with random weights, made where they are used, and rows to train them on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from internvl_api.models.catalogue import CatalogueModel, LanguageModel, VisionTower, find_model
from internvl_trainer.data.sample import Sample
from internvl_trainer.data.tokenize import IGNORED
from internvl_trainer.model.attention import choose_attention
from internvl_trainer.model.chat_model import ChatModel
from internvl_trainer.model.checkpoint_format import native_config, read_architecture
from transformers import InternVLForConditionalGeneration

IMAGE_TOKEN = 9  # the id that stands for <IMG_CONTEXT>; ids of text are larger
TINY = CatalogueModel(
    "tiny",
    VisionTower("tiny", 64, 2, 2, 128, qkv_bias=True, qk_norm=False, layer_norm=True),
    LanguageModel("tiny", "qwen2", 128, 2, 4, 2, 256, 512, attention_bias=True),
    "Hermes-2",
    tile_size=56,
)
"""A model for machines without a GPU."""


def catalogue_model(name: str, layers: int | None = None) -> CatalogueModel:
    """The model with this name, or TINY, with the first `layers` layers of its language model."""
    model = TINY if name == TINY.name else find_model(name)
    if model is None:
        raise ValueError(f"{name} is not in the catalogue")
    return model if layers is None else replace(model, language=replace(model.language, layers=layers))


def upstream_config(model: CatalogueModel) -> dict[str, Any]:
    """What upstream's config.json says of a model with these dimensions."""
    language, vision = model.language, model.vision
    return {
        "model_type": "internvl_chat",
        "ps_version": model.pixel_shuffle,
        "template": model.template,
        "force_image_size": model.tile_size,
        "llm_config": {
            "model_type": language.kind,
            "hidden_size": language.hidden,
            "num_hidden_layers": language.layers,
            "num_attention_heads": language.heads,
            "num_key_value_heads": language.kv_heads,
            "intermediate_size": language.intermediate,
            "vocab_size": language.vocab,
            "max_position_embeddings": 32768,
            "bias": False,
            "pad_token_id": 0,
        },
        "vision_config": {
            "image_size": model.tile_size,
            "hidden_size": vision.hidden,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.intermediate,
            "qkv_bias": vision.qkv_bias,
            "qk_normalization": vision.qk_norm,
            "norm_type": "layer_norm" if vision.layer_norm else "rms_norm",
        },
    }


def random_model(model: CatalogueModel, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> ChatModel:
    """The model with random weights, made on the device; on the device `meta` without any."""
    upstream = upstream_config(model)
    config: Any = native_config(upstream, IMAGE_TOKEN)
    config._attn_implementation = choose_attention(device, dtype)
    config.dtype = config.vision_config.dtype = config.text_config.dtype = dtype
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            native = InternVLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(usual)
    return ChatModel(native, read_architecture(upstream))


def random_rows(model: CatalogueModel, count: int, *, most_tiles: int, most_text: int, seed: int = 0) -> list[Sample]:
    """Rows with a picture of 1 to `most_tiles` tiles, and `most_text` tokens or fewer, the second half supervised."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        tiles = int(generator.integers(1, most_tiles + 1))
        length = generator.integers(most_text // 4, most_text + 1)
        text = generator.integers(IMAGE_TOKEN + 1, model.language.vocab, length)
        ids = np.concatenate([np.full(tiles * model.context_tokens, IMAGE_TOKEN), text]).astype(np.int64)
        labels = ids.copy()
        labels[: len(ids) - len(text) // 2] = IGNORED
        size = model.tile_size
        pixels = generator.integers(0, 256, (tiles, 3, size, size), np.uint8)
        rows.append(Sample(ids, labels, pixels, np.ones(tiles, np.int64)))
    return rows

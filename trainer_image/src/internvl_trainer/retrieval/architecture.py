"""Upstream's config.json (model_type internvl) as what the retrieval model is built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import LlamaConfig
from transformers.models.internvl import InternVLVisionConfig

from internvl_trainer.model.checkpoint_format.config import UnsupportedArchitecture, sub_config, vision_config

# What upstream's InternVLConfig assumes where config.json is silent.
_DEFAULTS = {"clip_embed_dim": 768, "attn_pool_num_heads": 16, "num_query_token": 96}
_DEFAULT_FREQUENCY = 2
# Upstream's QLLaMA layers have these as numbers, whatever config.json says: how many leading positions cross-attend
# (and only where a sequence has that many), and how wide the image features are. Directories made by this project may
# set them, so that a small model can have cross-attention that runs.
_CROSS_ATTENTION_SLOTS = 96
_CROSS_ATTENTION_WIDTH = 3200
# Fields of qllama_config that upstream's layers read. Others of LLaMA's (num_key_value_heads, rope_theta, rope_scaling,
# attention_bias) may stand in config.json but change nothing there, so they are left at the first LLaMA's values.
_QLLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


class QLlamaConfig(LlamaConfig):  # type: ignore[no-untyped-call]  # its base's __init_subclass__
    """LLaMA's config with what cross-attention needs.

    Attributes:
        num_query_token: learned queries, which stand before the text.
        cross_attention_frequency: every n-th layer has cross-attention, the first among them.
        cross_attention_slots: leading positions that cross-attend; shorter sequences do not at all.
        cross_attention_width: of the image features.
    """

    model_type = "qllama"

    num_query_token: int = _DEFAULTS["num_query_token"]
    cross_attention_frequency: int = _DEFAULT_FREQUENCY
    cross_attention_slots: int = _CROSS_ATTENTION_SLOTS
    cross_attention_width: int = _CROSS_ATTENTION_WIDTH


@dataclass(frozen=True)
class RetrievalArchitecture:
    """Everything the model is built from.

    Attributes:
        embed_dim: of the space in which images and texts are compared.
        pool_heads: attention heads of both pooling blocks.
    """

    vision: InternVLVisionConfig
    qllama: QLlamaConfig
    embed_dim: int
    pool_heads: int
    kind: Literal["qllama"] = "qllama"

    @property
    def image_size(self) -> int:
        """Pixels of an image's side."""
        size: int = self.vision.image_size[0]  # type: ignore[index]
        return size


def read_retrieval_architecture(upstream: Mapping[str, Any], image_size: int | None = None) -> RetrievalArchitecture:
    """What config.json describes.

    Args:
        image_size: pixels of a side; None: as the checkpoint has it.

    Raises:
        UnsupportedArchitecture: not a stage-2 InternVL, or one whose LoRA is not merged.
    """
    vision, qllama = sub_config(upstream, "vision_config"), sub_config(upstream, "qllama_config")
    for field in ("use_backbone_lora", "use_qllama_lora"):
        if upstream.get(field):
            raise UnsupportedArchitecture(
                f"{field} is {upstream[field]}: the weights hold an unmerged LoRA; merge it into them first"
            )
    settings = {key: upstream.get(key, default) for key, default in _DEFAULTS.items()}
    native_vision = vision_config(
        {**vision, "image_size": image_size or upstream.get("force_image_size") or vision.get("image_size", 224)}
    )
    return RetrievalArchitecture(
        vision=native_vision,
        qllama=QLlamaConfig(
            **{key: qllama[key] for key in _QLLAMA_FIELDS if key in qllama},
            num_query_token=settings["num_query_token"],
            cross_attention_frequency=_frequency(upstream, qllama),
            cross_attention_slots=qllama.get("cross_attention_slots", _CROSS_ATTENTION_SLOTS),
            cross_attention_width=qllama.get("cross_attention_width", _CROSS_ATTENTION_WIDTH),
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
        ),
        embed_dim=settings["clip_embed_dim"],
        pool_heads=settings["attn_pool_num_heads"],
    )


def _frequency(upstream: Mapping[str, Any], qllama: Mapping[str, Any]) -> int:
    """Upstream takes it as an argument of the whole config but stores it in qllama_config."""
    for config in (upstream, qllama):
        if (value := config.get("cross_attention_frequency")) is not None:
            return int(value)
    return _DEFAULT_FREQUENCY

"""The retrieval model's architecture, read from upstream's config.json (model_type internvl)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import LlamaConfig
from transformers.models.internvl import InternVLVisionConfig

from internvl_trainer.model.checkpoint_format.config import UnsupportedArchitecture, sub_config, vision_config

# Defaults of upstream's InternVLConfig.
_DEFAULTS = {"clip_embed_dim": 768, "attn_pool_num_heads": 16, "num_query_token": 96}
_DEFAULT_FREQUENCY = 2
# Upstream hard-codes these two in QLLaMA's layers: the number of leading positions that cross-attend (in sequences that
# have as many), and the width of the image features. Here config.json may set them, so that cross-attention also runs
# in a small model.
_CROSS_ATTENTION_SLOTS = 96
_CROSS_ATTENTION_WIDTH = 3200
# Fields of qllama_config that upstream's layers read. They ignore LLaMA's others (num_key_value_heads, rope_theta,
# rope_scaling, attention_bias), which therefore keep the values of the first LLaMA.
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
    """LLaMA's config with the settings of cross-attention.

    Attributes:
        num_query_token: learned queries before the text.
        cross_attention_frequency: every n-th layer has cross-attention, starting with the first.
        cross_attention_slots: leading positions that cross-attend; shorter sequences do not cross-attend.
        cross_attention_width: of the image features.
    """

    model_type = "qllama"

    num_query_token: int = _DEFAULTS["num_query_token"]
    cross_attention_frequency: int = _DEFAULT_FREQUENCY
    cross_attention_slots: int = _CROSS_ATTENTION_SLOTS
    cross_attention_width: int = _CROSS_ATTENTION_WIDTH


@dataclass(frozen=True)
class RetrievalArchitecture:
    """Configs of the retrieval model's parts.

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
    """The architecture that config.json describes.

    Args:
        image_size: pixels of an image's side; None means the checkpoint's.

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
    """The cross-attention frequency, which upstream reads from the whole config and stores in qllama_config."""
    for config in (upstream, qllama):
        if (value := config.get("cross_attention_frequency")) is not None:
            return int(value)
    return _DEFAULT_FREQUENCY

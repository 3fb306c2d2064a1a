"""The native InternVLConfig of upstream's config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from transformers import InternVLConfig, LlamaConfig, Phi3Config, PreTrainedConfig, Qwen2Config
from transformers.models.internvl import InternVLVisionConfig

LanguageKind = Literal["qwen2", "internlm2", "llama", "phi3"]

DEFAULT_TEMPLATES: dict[str, str] = {
    "qwen2": "Hermes-2",
    "internlm2": "internlm2-chat",
    "llama": "internlm2-chat",
    "phi3": "phi3-chat",
}
"""Templates of directories whose config.json names none."""


class UnsupportedArchitecture(ValueError):
    """config.json describes a model without a native counterpart."""


@dataclass(frozen=True)
class Architecture:
    """Properties that the tensor mapping and the forward pass need beyond the native config.

    Attributes:
        kind: family of the language model, as upstream names it.
        heads, kv_heads: of the language model; InternLM2's fused wqkv is laid out by KV group.
        select_layer: index into the vision tower's hidden states (embeddings first); -1 is the last layer's output.
        pixel_shuffle_version: "v2", or "v1" whose output has height and width swapped.
        image_size: pixels of a tile's side.
    """

    kind: LanguageKind
    heads: int
    kv_heads: int
    select_layer: int
    pixel_shuffle_version: str
    image_size: int
    downsample_ratio: float
    patch_size: int
    template: str
    drop_path_rate: float = 0.0

    @property
    def context_tokens(self) -> int:
        """`<IMG_CONTEXT>` tokens for one tile."""
        return count_context_tokens(self.image_size, self.patch_size, self.downsample_ratio)


def count_context_tokens(image_size: int, patch_size: int, downsample_ratio: float) -> int:
    """`<IMG_CONTEXT>` tokens of one tile: (image_size / patch_size x downsample_ratio) squared."""
    return int((image_size // patch_size) ** 2 * downsample_ratio**2)


def read_architecture(upstream: Mapping[str, Any]) -> Architecture:
    """The architecture in upstream's config.json.

    Raises:
        UnsupportedArchitecture: not an internvl_chat, or an unknown language model.
    """
    if upstream.get("model_type") != "internvl_chat":
        raise UnsupportedArchitecture(
            f"model_type is {upstream.get('model_type')!r}; expected 'internvl_chat' (upstream's format) "
            f"or 'internvl' (transformers' own)"
        )
    language, vision = sub_config(upstream, "llm_config"), sub_config(upstream, "vision_config")
    kind = language_kind(language.get("model_type"), "llm_config.model_type")
    vision_size = vision.get("image_size", _VISION_DEFAULTS["image_size"])
    return Architecture(
        kind=kind,
        heads=language["num_attention_heads"],
        kv_heads=language.get("num_key_value_heads") or language["num_attention_heads"],
        select_layer=upstream.get("select_layer", -1),
        pixel_shuffle_version=upstream.get("ps_version", "v1"),
        image_size=upstream.get("force_image_size") or vision_size,
        downsample_ratio=upstream.get("downsample_ratio", 0.5),
        patch_size=vision.get("patch_size", _VISION_DEFAULTS["patch_size"]),
        template=upstream.get("template") or DEFAULT_TEMPLATES[kind],
        drop_path_rate=vision.get("drop_path_rate", 0.0),
    )


def language_kind(name: object, field: str) -> LanguageKind:
    """The language model's family by its model_type; raises UnsupportedArchitecture."""
    kinds: tuple[LanguageKind, ...] = get_args(LanguageKind)
    for kind in kinds:
        if kind == name:
            return kind
    raise UnsupportedArchitecture(f"{field} is {name!r}; supported are {', '.join(kinds)}")


def native_config(upstream: Mapping[str, Any], image_token_id: int) -> InternVLConfig:
    """The native config of the same model; weights are not tied, as upstream stores both matrices."""
    architecture = read_architecture(upstream)
    return InternVLConfig(
        vision_config=vision_config(sub_config(upstream, "vision_config")),
        text_config=_text_config(sub_config(upstream, "llm_config"), architecture.kind),
        image_token_id=image_token_id,
        image_seq_length=architecture.context_tokens,
        downsample_ratio=architecture.downsample_ratio,
        projector_hidden_act="gelu",
        vision_feature_layer=architecture.select_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def sub_config(upstream: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object inside config.json. Raises UnsupportedArchitecture when it is missing."""
    value = upstream.get(key)
    if not isinstance(value, Mapping):
        raise UnsupportedArchitecture(f"{key} is missing or not an object")
    return value


# Defaults of upstream's InternVisionConfig: InternViT-6B at 224 pixels.
_VISION_DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 224,
    "qkv_bias": False,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "qk_normalization": True,
    "num_hidden_layers": 48,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 0.1,
}


def vision_config(upstream: Mapping[str, Any]) -> InternVLVisionConfig:
    """The native vision tower of upstream's vision_config."""
    value = {**_VISION_DEFAULTS, **{key: upstream[key] for key in _VISION_DEFAULTS if key in upstream}}
    return InternVLVisionConfig(
        hidden_size=value["hidden_size"],
        num_hidden_layers=value["num_hidden_layers"],
        num_attention_heads=value["num_attention_heads"],
        intermediate_size=value["intermediate_size"],
        attention_bias=value["qkv_bias"],
        use_qk_norm=value["qk_normalization"],
        hidden_act=value["hidden_act"],
        norm_type=value["norm_type"],
        layer_norm_eps=value["layer_norm_eps"],
        attention_dropout=value["attention_dropout"],
        projection_dropout=value["dropout"],
        initializer_range=value["initializer_range"],
        layer_scale_init_value=value["initializer_factor"],
        image_size=value["image_size"],
        patch_size=value["patch_size"],
        num_channels=value["num_channels"],
    )


_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_KIND_FIELDS: dict[str, tuple[str, ...]] = {
    "qwen2": ("sliding_window", "use_sliding_window", "max_window_layers"),
    "internlm2": (),
    "llama": ("attention_bias", "mlp_bias", "head_dim"),
    "phi3": ("sliding_window", "resid_pdrop", "embd_pdrop", "original_max_position_embeddings"),
}
_CONFIG_CLASSES: dict[str, Callable[..., PreTrainedConfig]] = {
    "qwen2": Qwen2Config,
    "internlm2": LlamaConfig,
    "llama": LlamaConfig,
    "phi3": Phi3Config,
}


def _text_config(upstream: Mapping[str, Any], kind: LanguageKind) -> PreTrainedConfig:
    fields = {key: upstream[key] for key in (*_TEXT_FIELDS, *_KIND_FIELDS[kind]) if key in upstream}
    if kind == "internlm2":  # InternLM2Config's own default is a bias on wqkv and wo
        fields["attention_bias"] = upstream.get("bias", True)
    rope = _rope_parameters(upstream)
    return _CONFIG_CLASSES[kind](**fields, rope_parameters=rope, tie_word_embeddings=False)


def _rope_parameters(upstream: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(upstream.get("rope_scaling") or {})
    rope_type = rope.pop("type", None) or rope.pop("rope_type", None) or "default"
    rope.pop("rope_type", None)
    # Phi-3's first release calls longrope "su".
    return {
        **rope,
        "rope_type": "longrope" if rope_type == "su" else rope_type,
        "rope_theta": upstream.get("rope_theta", 10000.0),
    }

"""Trainable parameters: freezing by tower, and LoRA in upstream's shape.

Upstream has one LoRA pair on a fused query-key-value projection (InternLM2's wqkv, InternViT's qkv). The three native
projections share one A here, and the rows of their three B's together are those of upstream's B, so parameter counts
and functions are equal. One difference remains: each projection draws its own dropout mask.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..errors import UserError
from .chat_model import ChatModel

ADAPTER = "default"

_VISION_TARGETS = (
    r"model\.vision_tower\.encoder\.layer\.\d+\."
    r"(attention\.(q_proj|k_proj|v_proj|projection_layer)|mlp\.(fc1|fc2))"
)
_LANGUAGE_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.({attention})|mlp\.({mlp}))"
_LANGUAGE_LAYERS = {
    "phi3": ("qkv_proj|o_proj", "gate_up_proj|down_proj"),
    "default": ("q_proj|k_proj|v_proj|o_proj", "gate_proj|up_proj|down_proj"),
}
_TOWERS = {
    "vision": ("native.model.vision_tower.",),
    "projector": ("native.model.multi_modal_projector.",),
    "language": ("native.model.language_model.", "native.lm_head."),
}


class Adaptable(Protocol):
    """A model that accepts adapters: ChatModel, or RetrievalModel, which is its own native model."""

    @property
    def native(self) -> Any: ...

    @property
    def vision_tower(self) -> Any: ...

    @property
    def architecture(self) -> Any: ...


@dataclass(frozen=True)
class Freeze:
    """Parts that do not learn. The own weights of a tower with an adapter are always frozen."""

    vision: bool = False
    projector: bool = False
    language: bool = False
    lm_head: bool | None = None  # None follows `language`
    vision_last_layers: int = 0  # number of last vision layers that learn although `vision` is frozen


@dataclass(frozen=True)
class LoraSettings:
    """LoRA of both towers.

    Attributes:
        language_rank, vision_rank: 0 means no adapter on that tower.
        language_alpha, vision_alpha: None means 2 x the tower's rank, as upstream.
        language_targets, vision_targets: regular expressions on native module names; None means upstream's layers.
    """

    language_rank: int = 0
    vision_rank: int = 0
    language_alpha: float | None = None
    vision_alpha: float | None = None
    dropout: float = 0.05
    use_dora: bool = False
    language_targets: str | None = None
    vision_targets: str | None = None


@dataclass(frozen=True)
class TrainableReport:
    """Parameter counts of the whole model, and (trainable, total) of each tower: vision, projector, language."""

    trainable: int
    total: int
    by_tower: dict[str, tuple[int, int]]

    @property
    def percent(self) -> float:
        return 100.0 * self.trainable / self.total

    def __str__(self) -> str:
        lines = [f"trainable {self.trainable:,} || all {self.total:,} || {self.percent:.4f} %"]
        lines += [f"  {tower}: {trainable:,} of {total:,}" for tower, (trainable, total) in self.by_tower.items()]
        return "\n".join(lines)


def apply_method(
    model: ChatModel,
    method: str,
    *,
    freeze: Freeze = Freeze(),
    lora: LoraSettings | None = None,
    seed: int = 0,
) -> TrainableReport:
    """Add adapters and set requires_grad, in place; the global random state does not change.

    Args:
        method: "full" or "lora".
        seed: of the adapters' initial values, the same on every rank.

    Raises:
        UserError: nothing would learn, or "lora" without a rank.
    """
    lora = lora or LoraSettings()
    if method not in ("full", "lora"):
        raise UserError("UnknownMethod", f"method is {method!r}; expected full or lora", "method")
    if method == "lora":
        if lora.language_rank <= 0 and lora.vision_rank <= 0:
            raise UserError("LoraRankMissing", "method lora needs a lora_rank above 0 on a tower", "lora")
        add_lora(model, lora_config(model, lora), seed=seed)
    _freeze(model, freeze, lora if method == "lora" else LoraSettings())
    report = trainable_report(model)
    if report.trainable == 0:
        raise UserError("NothingToTrain", "every part is frozen and there is no adapter; unfreeze one", "freeze")
    return report


def lora_config(model: Adaptable, settings: LoraSettings) -> LoraConfig:
    """One PEFT config for both towers, which PEFT can load on the exported native model."""
    language, vision = _language_targets(model, settings), settings.vision_targets or _VISION_TARGETS
    towers = (
        (language, settings.language_rank, settings.language_alpha),
        (vision, settings.vision_rank, settings.vision_alpha),
    )
    (_, rank, alpha), *others = chosen = [(targets, rank, alpha or 2 * rank) for targets, rank, alpha in towers if rank]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT only divides it by the rank, so a float works
        lora_dropout=settings.dropout,
        use_dora=settings.use_dora,
        target_modules="|".join(f"({targets})" for targets, _, _ in chosen),
        rank_pattern={targets: rank for targets, rank, _ in others},
        alpha_pattern={targets: alpha for targets, _, alpha in others},
    )


def _language_targets(model: Adaptable, settings: LoraSettings) -> str:
    if settings.language_targets:
        return settings.language_targets
    attention, mlp = _LANGUAGE_LAYERS.get(model.architecture.kind, _LANGUAGE_LAYERS["default"])
    return _LANGUAGE_TARGETS.format(attention=attention, mlp=mlp)


def add_lora(model: Adaptable, config: LoraConfig, *, seed: int, share: bool = True) -> None:
    """Inject adapters; with `share`, the parts of each fused projection share one A."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model.native, adapter_name=ADAPTER)
    if share:
        for query, *others in fused_projections(model):
            for layer in others:
                layer.lora_A[ADAPTER].weight = query.lora_A[ADAPTER].weight


def fused_projections(model: Adaptable) -> Iterator[tuple[LoraLayer, LoraLayer, LoraLayer]]:
    """The (q, k, v) adapter layers of each projection that upstream fuses."""
    attentions = [layer.attention for layer in model.vision_tower.encoder.layer]
    if model.architecture.kind == "internlm2":
        attentions += [layer.self_attn for layer in model.native.model.language_model.layers]
    for attention in attentions:
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        if all(isinstance(layer, LoraLayer) for layer in layers):
            yield layers


def lora_layers(model: Adaptable) -> Iterator[tuple[str, LoraLayer]]:
    """Adapter layers with their native names."""
    for name, module in model.native.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def name_prefix(model: Adaptable) -> str:
    """The prefix of parameter names before the native model's names."""
    return "" if model.native is model else "native."


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_" in name


def learns(name: str, freeze: Freeze, lora: LoraSettings = LoraSettings()) -> bool:
    """Whether a tower's own parameter learns, by its name in a ChatModel or in the native model."""
    language = not freeze.language and not lora.language_rank
    parts = {
        ".vision_tower.": not freeze.vision and not lora.vision_rank,
        ".multi_modal_projector.": not freeze.projector,
        ".language_model.": language,
        ".lm_head.": language if freeze.lm_head is None else not freeze.lm_head,
    }
    return next(learning for part, learning in parts.items() if part in f".{name}")


def _freeze(model: ChatModel, freeze: Freeze, lora: LoraSettings) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or learns(name, freeze, lora))
    layers = model.vision_tower.encoder.layer
    for layer in layers[len(layers) - freeze.vision_last_layers :]:
        _unfreeze_weights(layer)


def _unfreeze_weights(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(True)


def trainable_report(model: nn.Module, towers: Mapping[str, tuple[str, ...]] = _TOWERS) -> TrainableReport:
    """Parameter counts with full sizes, also under ZeRO-3; a shared parameter counts once.

    Args:
        towers: name to prefixes of parameter names; the first match counts.
    """
    by_tower = dict.fromkeys(towers, (0, 0))
    for name, parameter in model.named_parameters():
        tower = next(tower for tower, prefixes in towers.items() if name.startswith(prefixes))
        count = _count(parameter)
        trainable, total = by_tower[tower]
        by_tower[tower] = (trainable + count * parameter.requires_grad, total + count)
    return TrainableReport(
        trainable=sum(trainable for trainable, _ in by_tower.values()),
        total=sum(total for _, total in by_tower.values()),
        by_tower=by_tower,
    )


def _count(parameter: nn.Parameter) -> int:
    """Elements of a parameter: of the whole tensor under ZeRO-3, and unpacked when it is quantized."""
    state = getattr(parameter, "quant_state", None)
    return int(getattr(parameter, "ds_numel", parameter.numel()) if state is None else state.shape.numel())


def native_name(name: str) -> str | None:
    """The native model's name of a ChatModel parameter; None for an adapter parameter."""
    if is_adapter(name):
        return None
    return re.sub(r"\.base_layer\.", ".", name.removeprefix("native."))

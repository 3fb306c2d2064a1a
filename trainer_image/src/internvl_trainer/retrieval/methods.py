"""Trainable parameters of each method of upstream's retrieval guides: full, head and lora."""

from __future__ import annotations

from dataclasses import replace

from internvl_trainer.errors import UserError
from internvl_trainer.model.adapters import (
    LoraSettings,
    TrainableReport,
    add_lora,
    is_adapter,
    lora_config,
    trainable_report,
)
from internvl_trainer.retrieval.model import RetrievalModel

HEAD = ("qllama.lm_head.weight", "text_projection")
"""Parameters that upstream's --unfreeze_qllama_head and its LoRA train (0.2B of InternVL-14B).

Neither loss reaches the language head, so only text_projection changes.
"""
UNREACHED = ("qllama.lm_head.weight",)
"""Parameters for which no loss of this stage has a gradient."""
TOWERS = {"vision": ("vision_tower.", "clip_projector."), "qllama": ("",)}
"""Tower to prefixes of parameter names; the first match counts."""

# Upstream's LoRA layers: all of InternViT's, and of QLLaMA's all but those of cross-attention.
_VISION_TARGETS = (
    r"vision_tower\.encoder\.layer\.\d+\.(attention\.(q_proj|k_proj|v_proj|projection_layer)|mlp\.(fc1|fc2))"
)
_QLLAMA_TARGETS = (
    r"qllama\.model\.layers\.\d+\."
    r"(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))"
)
GUIDE_LORA = LoraSettings(language_rank=16, vision_rank=16)
"""Upstream's LoRA: rank 16 on both towers, alpha 32, dropout 0.05."""


def apply_retrieval_method(
    model: RetrievalModel, method: str, *, lora: LoraSettings = GUIDE_LORA, seed: int = 0
) -> TrainableReport:
    """Add adapters and set requires_grad, in place.

    Args:
        method: "full", "head" (only HEAD) or "lora" (adapters and HEAD).
        seed: of the adapters' initial values, the same on every rank.

    Raises:
        UserError: an unknown method, or "lora" without a rank.
    """
    if method not in ("full", "head", "lora"):
        raise UserError("UnknownMethod", f"method is {method!r}; expected full, head or lora", "method")
    if method == "lora":
        if lora.language_rank <= 0 and lora.vision_rank <= 0:
            raise UserError("LoraRankMissing", "method lora needs a lora_rank above 0 on a tower", "lora")
        add_lora(model, lora_config(model, _with_targets(lora)), seed=seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method == "full" or is_adapter(name) or name in HEAD)
    return trainable_report(model, TOWERS)


def _with_targets(lora: LoraSettings) -> LoraSettings:
    return replace(
        lora,
        language_targets=lora.language_targets or _QLLAMA_TARGETS,
        vision_targets=lora.vision_targets or _VISION_TARGETS,
    )

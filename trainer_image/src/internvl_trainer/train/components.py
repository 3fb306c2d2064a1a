"""The parts of training that differ between chat and retrieval models; the loop is the same for both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from internvl_api.run_config import RunConfig
from torch import nn
from torch.utils.data import Dataset

from internvl_trainer.data.loader import Collate
from internvl_trainer.data.sampler import Order
from internvl_trainer.distributed import Group
from internvl_trainer.model.adapters import Freeze, LoraSettings
from internvl_trainer.train.deepspeed_config import deepspeed_config
from internvl_trainer.train.sample_answers import SampleAnswers
from internvl_trainer.train.validation import Validation

Export = Callable[[Any, Path], Iterator[Path]]
"""Writes what an engine has trained into this rank's directory; yields each complete file of this rank.

All ranks iterate over it.
"""


@dataclass
class Components:
    """A model ready to train, and the rows it learns from.

    Attributes:
        model: its forward takes what `collation` makes, and returns `loss_sum`: the sum of the rows' (weighted) losses.
        groups: the optimizer's parameter groups; a group's `lr_scale` multiplies the learning rate.
        dataset: what `order` draws from.
        datasets: names, by the numbers in a batch's `sources`.
        samples: answers to a few held-out rows during training; None where they are not asked for.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    dataset: Dataset[Any]
    order: Order[Any]
    collation: Collate
    validation: Validation | None
    export: Export
    datasets: list[str] = field(default_factory=list)
    samples: SampleAnswers | None = None


def lora_settings(config: RunConfig) -> LoraSettings | None:
    """The spec's adapter shape, for method lora."""
    if config.method != "lora":
        return None
    lora = config.lora
    return LoraSettings(
        language_rank=lora.language_rank,
        vision_rank=lora.vision_rank,
        language_alpha=lora.language_alpha,
        vision_alpha=lora.vision_alpha,
        dropout=lora.dropout,
        use_dora=lora.dora,
    )


def freeze(config: RunConfig) -> Freeze:
    """The spec's freeze flags."""
    chosen = config.training.freeze
    return Freeze(vision=chosen.vision, projector=chosen.projector, language=chosen.language)


def weights_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of the weights in the forward pass."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def partitioning(config: RunConfig, group: Group) -> dict[str, Any] | None:
    """DeepSpeed's configuration where parameters are partitioned from the start (ZeRO-3)."""
    return deepspeed_config(config, group.world_size) if config.training.zero_stage == 3 else None

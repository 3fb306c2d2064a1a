"""Which parameters learn: freezing by tower, and LoRA in upstream's shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .chat_model import ChatModel


@dataclass(frozen=True)
class Freeze:
    """True keeps a part as it is. `language` does not touch adapters put on it."""

    vision: bool = False
    projector: bool = False
    language: bool = False
    lm_head: bool | None = None  # None: as `language`
    vision_last_layers: int = 0  # this many last vision layers learn although `vision` is frozen


@dataclass(frozen=True)
class LoraSettings:
    """Ranks of 0 mean no adapter on that tower. `alpha` None means upstream's 2 x lora_rank."""

    language_rank: int = 0
    vision_rank: int = 0
    alpha: float | None = None
    dropout: float = 0.05
    use_dora: bool = False


@dataclass(frozen=True)
class TrainableReport:
    """Parameter counts of the whole model and by tower (vision, projector, language)."""

    trainable: int
    total: int
    by_tower: dict[str, tuple[int, int]]

    @property
    def percent(self) -> float:
        return 100.0 * self.trainable / self.total


def apply_method(
    model: ChatModel, method: str, *, freeze: Freeze = Freeze(), lora: LoraSettings | None = None, seed: int = 0
) -> TrainableReport:
    """Set requires_grad and put adapters in, in place. `method` is "full" or "lora"; seeds before adapters are made."""
    raise NotImplementedError


def trainable_report(model: ChatModel) -> TrainableReport:
    """Count parameters (full sizes, also under ZeRO-3), each shared one once."""
    raise NotImplementedError


def adapter_state_dict(model: ChatModel, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Adapter tensors under PEFT's file names. Give `state` (name -> full tensor) where parameters are partitioned."""
    raise NotImplementedError


def save_adapter(model: ChatModel, directory: str | Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json."""
    raise NotImplementedError


def load_adapter(model: ChatModel, directory: str | Path, *, trainable: bool = False) -> None:
    """Put a saved adapter on a model that has none."""
    raise NotImplementedError

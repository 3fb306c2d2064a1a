"""The native InternVL model with what transformers leaves out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import InternVLForConditionalGeneration


@dataclass
class ChatOutput:
    """What one forward pass gives.

    Attributes:
        loss_sum: fp32 scalar, the SUM of (weighted) cross entropies over the supervised positions of this batch. Divide
            by the global sum of `weight_sum` over ranks and accumulation steps for an exact mean.
        tokens: int64 scalar tensor, supervised positions in this batch.
        weight_sum: fp32 scalar tensor, the sum of loss weights (= tokens when no weights are given).
        logits: (B, L, vocab) fp32, only with `return_logits=True`.
    """

    loss_sum: torch.Tensor | None
    tokens: torch.Tensor | None
    weight_sum: torch.Tensor | None
    logits: torch.Tensor | None = None


class ChatModel(nn.Module):
    """`native` is transformers' InternVLForConditionalGeneration; parameter names are `native.` + its own names."""

    def __init__(
        self, native: InternVLForConditionalGeneration, *, pixel_shuffle_version: str = "v2", select_layer: int = -1
    ) -> None:
        super().__init__()
        self.native = native
        self.pixel_shuffle_version = pixel_shuffle_version
        self.select_layer = select_layer

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        return_logits: bool = False,
    ) -> ChatOutput:
        """One pass, `use_cache=False` always.

        Args:
            input_ids: (B, L) int64.
            pixel_values: (tiles, 3, S, S), uint8 (normalised here, on the device) or float (already normalised).
            image_flags: (tiles,) 1 for a real tile, 0 for the blank tile of a text-only row.
            attention_mask: (B, L) bool, True on real tokens; None when nothing is padded or when rows are packed.
            position_ids: (B, L); reset to 0 at each packed row's start.
            labels: (B, L) int64, -100 where nothing is supervised; unshifted.
            loss_weights: (B, L) fp32 weight of each label's cross entropy.
            return_logits: also compute logits at every position.
        """
        raise NotImplementedError

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth in the vision tower, growing linearly from 0 to `rate` over the layers; training mode only."""
        raise NotImplementedError

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass, in both towers."""
        raise NotImplementedError

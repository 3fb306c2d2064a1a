"""Samples to a batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .dataset import Sample


def collate(samples: Sequence[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-pad to the longest row.

    Returns:
        input_ids, labels, position_ids (B, L) int64; attention_mask (B, L) bool, from lengths, never from token ids;
        pixel_values (tiles, 3, S, S) uint8; image_flags (tiles,) int64. All are keyword arguments of ChatModel.forward.
    """
    raise NotImplementedError

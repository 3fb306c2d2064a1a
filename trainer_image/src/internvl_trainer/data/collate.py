"""Samples to a batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .conversation import IGNORED
from .dataset import Sample


def collate(samples: Sequence[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-pad to the longest row.

    Returns:
        input_ids, labels, position_ids (B, L) int64; attention_mask (B, L) bool, from lengths, never from token ids;
        pixel_values (tiles, 3, S, S) uint8; image_flags (tiles,) int64. All are keyword arguments of ChatModel.forward.
    """
    lengths = torch.tensor([sample.length for sample in samples])
    longest = int(lengths.max())
    positions = torch.arange(longest)
    return {
        "input_ids": _pad([sample.input_ids for sample in samples], longest, pad_token_id),
        "labels": _pad([sample.labels for sample in samples], longest, IGNORED),
        "attention_mask": positions[None] < lengths[:, None],
        "position_ids": positions[None].repeat(len(samples), 1),
        "pixel_values": torch.from_numpy(np.concatenate([sample.tiles for sample in samples])),
        "image_flags": torch.from_numpy(np.concatenate([sample.image_flags for sample in samples])),
    }


def _pad(rows: Sequence[np.ndarray], length: int, value: int) -> torch.Tensor:
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    for position, row in enumerate(rows):
        padded[position, : len(row)] = torch.from_numpy(row)
    return padded

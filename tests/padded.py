"""Rows as upstream batches them, each padded to the longest: the reference for flat batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from internvl_trainer.data.collate import Weighting, row_weight
from internvl_trainer.data.sample import Sample
from internvl_trainer.data.tokenize import IGNORED


def pad_rows(
    samples: Sequence[Sample], weighting: Weighting = "token", *, pad_token_id: int = 0
) -> dict[str, torch.Tensor]:
    """Keyword arguments of ChatModel.forward: input_ids, labels, position_ids, loss_weights (B, L); a mask of real
    tokens, from lengths; the tiles of all rows, blank ones too."""
    lengths = torch.tensor([sample.length for sample in samples])
    longest = int(lengths.max())
    positions = torch.arange(longest)
    batch = {
        "input_ids": _pad([sample.input_ids for sample in samples], longest, pad_token_id),
        "labels": _pad([sample.labels for sample in samples], longest, IGNORED),
        "attention_mask": positions[None] < lengths[:, None],
        "position_ids": positions[None].repeat(len(samples), 1),
        "pixel_values": torch.from_numpy(np.concatenate([sample.tiles for sample in samples])),
        "image_flags": torch.from_numpy(np.concatenate([sample.image_flags for sample in samples])),
    }
    if weighting != "token":
        weights = [np.full(each.length, row_weight(each.labels, weighting), np.float32) for each in samples]
        batch["loss_weights"] = _pad(weights, longest, 0, torch.float32)
    return batch


def _pad(rows: Sequence[np.ndarray], length: int, value: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    padded = torch.full((len(rows), length), value, dtype=dtype)
    for position, row in enumerate(rows):
        padded[position, : len(row)] = torch.from_numpy(row)
    return padded

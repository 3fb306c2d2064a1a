"""Samples, or packs of samples, become a batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Literal

import numpy as np
import torch

from internvl_trainer.data.sample import Sample
from internvl_trainer.data.tokenize import IGNORED

Weighting = Literal["token", "sample", "square"]


def collate(samples: Sequence[Sample], pad_token_id: int, weighting: Weighting = "token") -> dict[str, torch.Tensor]:
    """Right-pad to the longest row.

    Returns:
        input_ids, labels, position_ids (B, L) int64; attention_mask (B, L) bool, from lengths, never from token ids;
        pixel_values (tiles, 3, S, S) uint8; image_flags (tiles,) int64; loss_weights (B, L) fp32 unless every token
        weighs the same. All are keyword arguments of ChatModel.forward.
    """
    lengths = torch.tensor([sample.length for sample in samples])
    longest = int(lengths.max())
    positions = torch.arange(longest)
    return {
        "input_ids": _pad([sample.input_ids for sample in samples], longest, pad_token_id),
        "labels": _pad([sample.labels for sample in samples], longest, IGNORED),
        "attention_mask": positions[None] < lengths[:, None],
        "position_ids": positions[None].repeat(len(samples), 1),
        **_media(samples),
        **_weights([[sample] for sample in samples], longest, weighting),
    }


def collate_packs(
    packs: Sequence[Sequence[Sample]], pad_token_id: int, weighting: Weighting = "token", *, flat: bool = False
) -> dict[str, torch.Tensor]:
    """The rows of each pack one after the other; packs right-padded to the longest.

    There is no attention_mask: positions start at 0 in each row (and in the padding), and from that transformers keeps
    rows from seeing each other (`create_causal_mask`). With `flat`, all rows make ONE sequence without padding: only
    then does its flash attention tell rows apart (`_is_packed_sequence` wants a batch of one). A row's first label is
    dropped, as the token before it is another row's.

    Returns:
        what `collate` does, but for attention_mask.
    """
    packs = [list(chain.from_iterable(packs))] if flat else packs
    longest = max(sum(sample.length for sample in pack) for pack in packs)
    return {
        "input_ids": _pad([np.concatenate([row.input_ids for row in pack]) for pack in packs], longest, pad_token_id),
        "labels": _pad(
            [np.concatenate([_without_first(row.labels) for row in pack]) for pack in packs], longest, IGNORED
        ),
        "position_ids": torch.stack([_positions([row.length for row in pack], longest) for pack in packs]),
        **_media(_pictured([row for pack in packs for row in pack])),
        **_weights(packs, longest, weighting),
    }


def source_numbers(packs: Sequence[Sequence[Sample]], *, flat: bool = False) -> torch.Tensor:
    """(B, L) int64 number of the dataset of each position, for packs collated as `collate_packs` does."""
    packs = [list(chain.from_iterable(packs))] if flat else packs
    longest = max(sum(sample.length for sample in pack) for pack in packs)
    return _pad(
        [np.concatenate([np.full(row.length, row.source, np.int64) for row in pack]) for pack in packs], longest, 0
    )


def row_weight(labels: np.ndarray, weighting: Weighting) -> float:
    """Weight of each of the n supervised tokens of a row: 1, 1/n or 1/sqrt(n), as upstream's loss_reduction."""
    count = int((labels[1:] != IGNORED).sum())
    if count == 0 or weighting == "token":
        return 1.0
    return 1 / count if weighting == "sample" else float(1 / np.sqrt(count))


def _weights(packs: Sequence[Sequence[Sample]], length: int, weighting: Weighting) -> dict[str, torch.Tensor]:
    if weighting == "token":
        return {}
    rows = [
        np.concatenate([np.full(row.length, row_weight(row.labels, weighting), np.float32) for row in pack])
        for pack in packs
    ]
    return {"loss_weights": _pad(rows, length, 0, torch.float32)}


def _media(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.from_numpy(np.concatenate([sample.tiles for sample in samples])),
        "image_flags": torch.from_numpy(np.concatenate([sample.image_flags for sample in samples])),
    }


def _pictured(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The samples with real tiles, or the first when there is none, to save the vision tower blank tiles."""
    return [sample for sample in samples if sample.image_flags.any()] or samples[:1]


def _without_first(labels: np.ndarray) -> np.ndarray:
    return np.concatenate([np.full(1, IGNORED, labels.dtype), labels[1:]])


def _positions(lengths: Sequence[int], length: int) -> torch.Tensor:
    padding = length - sum(lengths)
    return torch.cat([torch.arange(each) for each in (*lengths, padding)])


def _pad(rows: Sequence[np.ndarray], length: int, value: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    padded = torch.full((len(rows), length), value, dtype=dtype)
    for position, row in enumerate(rows):
        padded[position, : len(row)] = torch.from_numpy(row)
    return padded

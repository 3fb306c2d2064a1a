"""Samples become one flat batch of tensors: row after row, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import torch

from internvl_trainer.data.sample import Sample
from internvl_trainer.data.tokenize import IGNORED

Weighting = Literal["token", "sample", "square"]

HOST_TENSORS = frozenset({"row_starts", "image_flags"})
"""Tensors of a batch that stay on the host, where the model reads them without waiting for the device."""


def collate(
    samples: Sequence[Sample], weighting: Weighting = "token", *, image_token_id: int | None = None
) -> dict[str, torch.Tensor]:
    """All rows as ONE sequence; positions start at 0 in each row, and attention keeps rows apart by `row_starts`.

    A row's first label is dropped, as the token before it is another row's. What the model would otherwise have to ask
    the device for, it gets as indices.

    Args:
        image_token_id: id of `<IMG_CONTEXT>`; without it there are no `image_places`.

    Returns:
        input_ids, labels, position_ids (1, T) int64; row_starts (rows + 1,) int32, the last is T;
        supervised (S,) int64, the positions whose next token is supervised; image_places (C,) int64, those of
        `<IMG_CONTEXT>`; pixel_values (tiles, 3, S, S) uint8; image_flags (tiles,) int64; loss_weights (1, T) fp32
        unless every token weighs the same. All are keyword arguments of ChatModel.forward.
    """
    ids = np.concatenate([sample.input_ids for sample in samples])
    labels = np.concatenate([_without_first(sample.labels) for sample in samples])
    batch = {
        "input_ids": torch.from_numpy(ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.cat([torch.arange(sample.length) for sample in samples])[None],
        "row_starts": torch.tensor([0, *accumulate(sample.length for sample in samples)], dtype=torch.int32),
        "supervised": torch.from_numpy(np.flatnonzero(labels[1:] != IGNORED)),
    }
    if image_token_id is not None:
        batch["image_places"] = torch.from_numpy(np.flatnonzero(ids == image_token_id))
    if weighting != "token":
        weights = [np.full(sample.length, row_weight(sample.labels, weighting), np.float32) for sample in samples]
        batch["loss_weights"] = torch.from_numpy(np.concatenate(weights))[None]
    pictured = [sample for sample in samples if sample.image_flags.any()] or samples[:1]  # one blank tile if none
    batch["pixel_values"] = torch.from_numpy(np.concatenate([sample.tiles for sample in pictured]))
    batch["image_flags"] = torch.from_numpy(np.concatenate([sample.image_flags for sample in pictured]))
    return batch


def source_numbers(samples: Sequence[Sample]) -> torch.Tensor:
    """(S,) int64 number of the dataset of each of `collate`'s supervised positions."""
    counts = [int((sample.labels[1:] != IGNORED).sum()) for sample in samples]
    return torch.from_numpy(np.repeat(np.array([sample.source for sample in samples], np.int64), counts))


def row_weight(labels: np.ndarray, weighting: Weighting) -> float:
    """Weight of each of the n supervised tokens of a row: 1, 1/n or 1/sqrt(n), as upstream's loss_reduction."""
    count = int((labels[1:] != IGNORED).sum())
    if count == 0 or weighting == "token":
        return 1.0
    return 1 / count if weighting == "sample" else float(1 / np.sqrt(count))


def _without_first(labels: np.ndarray) -> np.ndarray:
    return np.concatenate([np.full(1, IGNORED, labels.dtype), labels[1:]])

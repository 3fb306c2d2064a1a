"""From a JSONL row to a Sample: conversation to ids and labels, media to tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .findings import Finding

OpenMedia = Callable[[str, str], bytes]
"""(root, relative path) -> the file's bytes; raises FileNotFoundError."""


@dataclass(frozen=True)
class DatasetDescription:
    """One entry of a meta JSON."""

    name: str
    root: str
    annotation: str
    max_tiles: int | None = None
    repeat_time: float = 1.0
    data_augment: bool = False
    length: int | None = None


@dataclass(frozen=True)
class SampleSettings:
    """All that decides how a row becomes a sample, but for the row and the tokenizer."""

    template: str
    image_size: int = 448
    context_tokens: int = 256  # <IMG_CONTEXT> tokens for each tile
    dynamic_tiles: bool = True
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    pad_to_square: bool = False
    min_frames: int = 8
    max_frames: int = 32
    frame_sampling: str = "rand"
    max_length: int = 8192
    compat: str = "default"  # or "upstream"


@dataclass
class Sample:
    """One row, ready for a batch.

    Attributes:
        input_ids, labels: (L,) int64; labels are -100 where nothing is supervised.
        tiles: (n, 3, S, S) uint8; a text-only row has one blank tile.
        image_flags: (n,) int64; 0 for the blank tile.
        findings: warnings met on the way (errors raise RowError).
    """

    input_ids: np.ndarray
    labels: np.ndarray
    tiles: np.ndarray
    image_flags: np.ndarray
    findings: list[Finding] = field(default_factory=list)

    @property
    def length(self) -> int:
        return int(self.input_ids.shape[0])


class RowError(Exception):
    """The row cannot become a sample; `findings` says why."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__("; ".join(str(finding) for finding in findings))
        self.findings = findings


def build_sample(
    row: Mapping[str, Any],
    dataset: DatasetDescription,
    settings: SampleSettings,
    tokenizer: PreTrainedTokenizerBase,
    open_media: OpenMedia,
    rng: np.random.Generator | None = None,
) -> Sample:
    """Tile, tokenize and label one row. `rng` decides augmentation and random frames; None: neither is random."""
    raise NotImplementedError

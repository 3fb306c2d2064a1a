"""Checks of a dataset's pairs before training: images and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.diagnostics import Finding, RowError
from internvl_trainer.data.media import OpenMedia, open_picture_with_notes
from internvl_trainer.data.pictures import DEFAULT, Decoding
from internvl_trainer.data.reserved_tokens import plain_text_warning, written_in
from internvl_trainer.data.row_schema import MediaFile
from internvl_trainer.retrieval.caption_files import PairRow
from internvl_trainer.retrieval.caption_text import SUMMARIZE, encode_caption, normalise_caption

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNCUT = 1 << 20  # tokens, more than any caption


@dataclass(frozen=True)
class Pairs:
    """The pairs of a dataset with their checks, for any process that checks some of them.

    Attributes:
        max_tokens: of a caption with its prompt, start and end; a longer one gets a warning.
    """

    dataset: DatasetDescription
    pairs: list[PairRow]
    open_media: OpenMedia
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    threads: int = 1
    decoding: Decoding = DEFAULT

    def check(self, rows: Sequence[int], sizes: np.ndarray) -> list[Finding]:
        """Findings of these pairs, in their order; each image is decoded once.

        `sizes`: (rows, 2) int32, filled with tokens, and 1 for the image.
        """
        wanted = [self.pairs[row] for row in rows]
        images = list(dict.fromkeys(row.media for row in wanted))
        with ThreadPoolExecutor(self.threads) as pool:
            look = partial(_check_picture, self.dataset, self.open_media, self.decoding)
            problems = dict(zip(images, pool.map(look, images), strict=True))
        return [
            finding.at(row.file, row.line)
            for row, size in zip(wanted, sizes, strict=True)
            for finding in _check(row, problems[row.media], self.tokenizer, self.max_tokens, size)
        ]

    def reopened(self) -> Pairs:
        """The same object: it has no open file that a forked process would share."""
        return self


def _check(
    row: PairRow,
    problems: list[Finding],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    size: np.ndarray,
) -> Iterator[Finding]:
    yield from problems
    if names := written_in(row.caption, tokenizer):
        yield plain_text_warning(names, "caption")
    tokens = len(encode_caption(tokenizer, SUMMARIZE + normalise_caption(row.caption), _UNCUT))
    size[:] = min(tokens, max_tokens), 1
    if tokens > max_tokens:
        message = f"{tokens} tokens with its prompt, of which {max_tokens} fit (training.maxSeqLength); its end is cut"
        yield Finding("CaptionCut", message, "caption", "warning")


def _check_picture(
    dataset: DatasetDescription, open_media: OpenMedia, decoding: Decoding, image: MediaFile
) -> list[Finding]:
    """The problem of a picture, or warnings about how it is decoded."""
    try:
        return open_picture_with_notes(image, dataset.root, open_media, decoding)[1]
    except RowError as error:
        return error.findings

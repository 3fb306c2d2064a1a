"""Checks of a dataset's rows before training: text, media and tokens. Imports no torch.

An error keeps a row out of training; a warning says that upstream's rule changes the row.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np

from .dataset_meta import DatasetDescription
from .diagnostics import Finding, RowError, errors_of
from .formats.source import RowSource, read_row
from .frames import check_video
from .media import OpenMedia, open_picture_with_notes
from .row_schema import ChatRow, MediaFile, RowMedia
from .row_tiles import tiles_per_image
from .sample import SampleSettings, encode_row
from .tiling import count_tiles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECE = 8  # rows that a thread takes at a time: handing them over one by one costs time
_BATCH = 512  # rows in flight; bounds memory, not the result
_REMEMBERED_IMAGES = 1 << 18  # several captions share an image, and a decoded size is a few bytes

Size = tuple[int, int]
SizeOf = Callable[[str], "tuple[Size, list[Finding]] | Finding"]


@dataclass(frozen=True)
class ChatRows:
    """The rows of a chat dataset with their checks, for any process that checks some of them."""

    index: RowSource
    checker: Checker
    threads: int = 1

    def check(self, rows: Sequence[int], sizes: np.ndarray) -> list[Finding]:
        """Findings of these rows, in their order; `sizes` as for `check_rows`."""
        return check_rows(self.index, self.checker, rows=rows, threads=self.threads, sizes=sizes)

    def reopened(self) -> ChatRows:
        """The same for a forked process, with open files of its own."""
        return replace(self, index=pickle.loads(pickle.dumps(self.index)))


@dataclass(frozen=True)
class Checker:
    """The inputs of `check_rows` that are the same for every row of a dataset."""

    dataset: DatasetDescription
    settings: SampleSettings
    open_media: OpenMedia
    tokenizer: PreTrainedTokenizerBase


def check_rows(
    index: RowSource,
    checker: Checker,
    *,
    rows: Sequence[int] | None = None,
    threads: int = 1,
    sizes: np.ndarray | None = None,
) -> list[Finding]:
    """Findings of the rows (all, or the given positions), in the given order.

    Args:
        threads: share the decoding and tokenizing, which release Python's lock.
        sizes: (rows, 2) int32, filled with tokens and tiles of each given row that could be encoded.
    """
    wanted = range(len(index)) if rows is None else rows
    return list(_findings(index, checker, wanted, threads, sizes))


def check_length(description: DatasetDescription, rows: int) -> list[Finding]:
    """A finding when the file does not have the number of rows that the user expects."""
    if description.length is None or description.length == rows:
        return []
    message = f"length is {description.length}, the file has {rows} rows; is it complete?"
    return [Finding("LengthMismatch", message, "length", file=description.annotation)]


def _findings(
    index: RowSource, checker: Checker, rows: Sequence[int], threads: int, sizes: np.ndarray | None
) -> Iterator[Finding]:
    size_of = lru_cache(maxsize=_REMEMBERED_IMAGES)(partial(_image_size, checker))

    def check(piece: range) -> list[Finding]:
        found: list[Finding] = []
        for number in piece:
            findings, size = _measure(index, int(rows[number]), checker, size_of)
            found += findings
            if sizes is not None and size is not None:
                sizes[number] = size
        return found

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(rows), _BATCH):
            end = min(len(rows), start + _BATCH)
            for found in pool.map(
                check, [range(first, min(end, first + _PIECE)) for first in range(start, end, _PIECE)]
            ):
                yield from found


def _measure(index: RowSource, position: int, checker: Checker, size_of: SizeOf) -> tuple[list[Finding], Size | None]:
    """Findings of one row, and its tokens and tiles when it could be encoded."""
    row, findings = read_row(index, position, checker.dataset.annotation)
    if row is None:
        return findings, None
    tiles, problems = _check_media(row.media, checker, size_of)
    size = None
    if not errors_of(problems):
        more, size = _count_tokens(row, tiles, checker)
        problems = problems + more
    return findings + [finding.at(row.file, row.line) for finding in problems], size


def _count_tokens(row: ChatRow, tiles: list[int], checker: Checker) -> tuple[list[Finding], Size | None]:
    try:
        encoded = encode_row(row, tiles, checker.settings.for_dataset(checker.dataset), checker.tokenizer)
    except RowError as error:
        return error.findings, None
    return encoded.findings, (len(encoded.input_ids), sum(tiles))


def _image_size(checker: Checker, path: str) -> tuple[Size, list[Finding]] | Finding:
    """Width and height of an image that decodes to its end, with warnings about it; else the problem."""
    dataset = checker.dataset
    try:
        image, warnings = open_picture_with_notes(
            MediaFile(path, "image"), dataset.root, checker.open_media, checker.settings.decoding
        )
    except RowError as error:
        return error.findings[0]
    return image.size, warnings


def _check_media(media: RowMedia, checker: Checker, size_of: SizeOf) -> tuple[list[int], list[Finding]]:
    """Tiles of each image or frame, and problems."""
    settings = checker.settings.for_dataset(checker.dataset)
    if media.has_video:
        try:
            frames, warnings = check_video(media, settings, checker.dataset.root, checker.open_media)
        except RowError as error:
            return [], error.findings
        return [1] * frames, warnings
    limit = tiles_per_image(settings, len(media.images))
    tiles, findings = [], []
    for image in media.images:
        found = size_of(image.path)
        if isinstance(found, Finding):
            findings.append(replace(found, field=image.field))
            continue
        size, warnings = found
        findings += [replace(warning, field=image.field) for warning in warnings]
        if settings.dynamic_tiles:
            tiles.append(
                count_tiles(*size, settings.image_size, settings.min_tiles, limit, thumbnail=settings.thumbnail)
            )
        else:
            tiles.append(1)
    return tiles, findings

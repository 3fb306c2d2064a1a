"""Every row of a dataset checked before anything is trained: shape, media, tokens. Needs no torch.

A finding is an error when the row cannot be trained on, or only by guessing; a warning when upstream's rule decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from internvl_trainer.data.diagnostics import Finding
from internvl_trainer.data.index import RowIndex
from internvl_trainer.data.row_schema import Row, image_fields, images_of, parse_row, video_of
from internvl_trainer.data.sample import (
    DatasetDescription,
    OpenMedia,
    RowError,
    SampleSettings,
    encode_row,
    fetch_media,
    settings_for,
)
from internvl_trainer.data.tiling import ImageProblem, count_tiles, decode_image
from internvl_trainer.data.video import VideoProblem, read_frames
from internvl_trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 512  # rows in flight; bounds memory, not the result
_REMEMBERED_IMAGES = 1 << 18  # captions come several to an image, and a decoded size is a few bytes


@dataclass(frozen=True)
class Checker:
    """What `check_row` needs; without a tokenizer, tokens are not counted."""

    dataset: DatasetDescription
    settings: SampleSettings
    open_media: OpenMedia
    tokenizer: PreTrainedTokenizerBase | None = None


def check_dataset(
    dataset: DatasetDescription,
    settings: SampleSettings,
    open_media: OpenMedia,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    annotation: str | None = None,
    threads: int = 1,
) -> list[Finding]:
    """Findings of a whole dataset, the annotation file's own first.

    Args:
        annotation: where the annotation file is on this machine; messages name `dataset.annotation`.
    """
    try:
        index = RowIndex.build(annotation or dataset.annotation)
    except UserError as error:
        return [Finding(error.reason, error.message, file=dataset.annotation)]
    findings = []
    if dataset.length is not None and dataset.length != len(index):
        message = f"length is {dataset.length}, but the annotation file has {len(index)} rows; is the file complete?"
        findings.append(Finding("LengthMismatch", message, f"{dataset.name}.length", file=dataset.annotation))
    return findings + check_rows(index, Checker(dataset, settings, open_media, tokenizer), threads=threads)


def check_rows(
    index: RowIndex,
    checker: Checker,
    *,
    rows: Sequence[int] | None = None,
    threads: int = 1,
    limit: int | None = None,
    sizes: np.ndarray | None = None,
) -> list[Finding]:
    """Findings of the rows (all, or the given positions), in the file's order.

    Args:
        threads: decoding and tokenizing leave Python's lock, so threads share the work.
        limit: stop after this many findings.
        sizes: (rows of the file, 2), filled in with tokens and tiles of each row that was encoded.
    """
    wanted = range(len(index)) if rows is None else rows
    return list(islice(_findings(index, checker, wanted, threads, sizes), limit))


def _findings(
    index: RowIndex, checker: Checker, rows: Sequence[int], threads: int, sizes: np.ndarray | None
) -> Iterator[Finding]:
    size_of = lru_cache(maxsize=_REMEMBERED_IMAGES)(partial(_image_size, checker))

    def check(position: int) -> list[Finding]:
        place = checker.dataset.annotation, index.line_number(position)
        findings, size = measure_row(index[position], checker, size_of)
        if sizes is not None and size is not None:
            sizes[position] = size
        return [finding.at(*place) for finding in findings]

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(rows), _BATCH):
            for found in pool.map(check, rows[start : start + _BATCH]):
                yield from found


Size = tuple[int, int]
SizeOf = Callable[[str], "Size | Finding"]


def _image_size(checker: Checker, path: str) -> Size | Finding:
    """Width and height of an image that decodes to its end; else what is wrong with it."""
    try:
        return decode_image(fetch_media(checker.dataset.root, path, "image", checker.open_media)).size
    except ImageProblem as error:
        return Finding("ImageUndecodable", f"{path}: {error}")
    except RowError as error:
        return error.findings[0]


def check_row(line: bytes, checker: Checker, size_of: SizeOf | None = None) -> list[Finding]:
    """Findings of one line, without its place."""
    return measure_row(line, checker, size_of)[0]


def measure_row(
    line: bytes, checker: Checker, size_of: SizeOf | None = None
) -> tuple[list[Finding], tuple[int, int] | None]:
    """Findings of one line, and its tokens and tiles when it could be encoded."""
    row, findings = parse_row(line)
    if row is None or _has_error(findings):
        return findings, None
    tiles, problems = _check_media(row, checker, size_of or partial(_image_size, checker))
    findings += problems
    if _has_error(findings) or checker.tokenizer is None:
        return findings, None
    try:
        encoded = encode_row(row, tiles, settings_for(checker.dataset, checker.settings), checker.tokenizer)
    except RowError as error:
        return findings + error.findings, None
    return findings + encoded.findings, (len(encoded.input_ids), sum(tiles))


def _has_error(findings: Iterable[Finding]) -> bool:
    return any(finding.severity == "error" for finding in findings)


def _check_media(row: Row, checker: Checker, size_of: SizeOf) -> tuple[list[int], list[Finding]]:
    """Tiles of each image (or frame), and what is wrong."""
    settings = settings_for(checker.dataset, checker.settings)
    if video := video_of(row):
        return _check_video(row, video, checker, settings)
    paths = images_of(row)
    limit = max(1, settings.max_tiles // max(1, len(paths)))
    tiles, findings = [], []
    for path, name in zip(paths, image_fields(row), strict=True):
        size = size_of(path)
        if isinstance(size, Finding):
            findings.append(Finding(size.reason, size.message, name))
        elif settings.dynamic_tiles:
            tiles.append(
                count_tiles(*size, settings.image_size, settings.min_tiles, limit, thumbnail=settings.thumbnail)
            )
        else:
            tiles.append(1)
    return tiles, findings


def _check_video(row: Row, path: str, checker: Checker, settings: SampleSettings) -> tuple[list[int], list[Finding]]:
    try:
        frames = read_frames(
            fetch_media(checker.dataset.root, path, "video", checker.open_media),
            min_frames=settings.min_frames,
            max_frames=settings.max_frames,
            sampling=settings.frame_sampling,
            clip=row.get("clip"),
        )
    except VideoProblem as error:
        return [], [Finding("VideoUndecodable", f"{path}: {error}", "video")]
    except RowError as error:
        return [], error.findings
    return [1] * len(frames), []


def findings_table(findings: Iterable[Finding]) -> Table:
    """For a terminal: one line a finding."""
    table = Table("severity", "file", "line", "field", "reason", "message")
    for finding in findings:
        cells = finding.severity, finding.file, finding.line, finding.field, finding.reason, finding.message
        table.add_row(
            *("" if cell is None else str(cell) for cell in cells), style="red" if finding.severity == "error" else ""
        )
    return table

"""From a JSONL row to a Sample: conversation to ids and labels, media to tiles."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .conversation import IMAGE_MARK, encode
from .findings import Finding
from .tiling import (
    JPEG_QUALITIES,
    ImageProblem,
    blank_tile,
    cut_tiles,
    decode_image,
    degrade_jpeg,
    fit_tile,
    stack_tiles,
)
from .video import VideoProblem, read_frames

OpenMedia = Callable[[str, str], bytes]
"""(root, relative path) -> the file's bytes; raises FileNotFoundError."""

VIDEO_MARK = "<video>"


@dataclass(frozen=True)
class DatasetDescription:
    """One entry of a meta JSON. `max_tiles` None: the run's own setting."""

    name: str
    root: str
    annotation: str
    max_tiles: int | None = None
    repeat_time: float = 1.0
    data_augment: bool = False
    length: int | None = None

    def count_rows(self, rows: int) -> int:
        """Rows in one epoch of a file with `rows` rows."""
        return int(rows * self.repeat_time)

    def source_row(self, position: int, rows: int) -> int:
        """Row of the file behind a position of the epoch: a share below 1 keeps the FIRST rows, as upstream does."""
        return position % rows


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

    @classmethod
    def single(cls, reason: str, message: str, field: str) -> RowError:
        return cls([Finding(reason, message, field)])


def read_meta(text: str, path: str) -> list[DatasetDescription]:
    """The datasets of a meta JSON, as upstream writes it: {name: {root, annotation, repeat_time, max_dynamic_patch, ...}}.

    Raises:
        UserError: naming the dataset and the field.
    """
    try:
        meta = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            "InvalidMeta", f"not valid JSON: {error.msg} (column {error.colno})", f"{path}:{error.lineno}"
        ) from error
    if not isinstance(meta, dict) or not meta:
        raise UserError("InvalidMeta", "expected an object of the form {name: {root, annotation, ...}}", path)
    return [_describe(name, entry, path) for name, entry in meta.items()]


def _describe(name: str, entry: Any, path: str) -> DatasetDescription:
    if not isinstance(entry, dict):
        raise UserError("InvalidMeta", f"expected an object, found {type(entry).__name__}", f"{path}: {name}")

    def take(key: str, kinds: tuple[type, ...], expected: str, default: Any = None) -> Any:
        value = entry.get(key, default)
        if value is None and default is None and key not in ("root", "annotation"):
            return None
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            found = "nothing" if key not in entry else json.dumps(value)
            raise UserError("InvalidMeta", f"expected {expected}, found {found}", f"{path}: {name}.{key}")
        return value

    description = DatasetDescription(
        name=name,
        root=take("root", (str,), "a path"),
        annotation=take("annotation", (str,), "the path of a JSONL file"),
        max_tiles=take("max_dynamic_patch", (int,), "a whole number"),
        repeat_time=float(take("repeat_time", (int, float), "a number", 1)),
        data_augment=take("data_augment", (bool,), "true or false", False),
        length=take("length", (int,), "a whole number"),
    )
    for key, value in (("repeat_time", description.repeat_time), ("max_dynamic_patch", description.max_tiles)):
        if value is not None and value <= 0:
            raise UserError("InvalidMeta", f"expected a number above 0, found {entry[key]}", f"{path}: {name}.{key}")
    if description.repeat_time > 1 and not description.repeat_time.is_integer():
        raise UserError(
            "InvalidMeta",
            f"above 1 expected a whole number, found {entry['repeat_time']}",
            f"{path}: {name}.repeat_time",
        )
    return description


def media_path(relative: str) -> str:
    """A path of a row, checked to stay inside the dataset's root.

    Raises:
        ValueError: it is absolute, a URL, or climbs out.
    """
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or "://" in relative or "\0" in relative or not path.parts:
        raise ValueError(f"{relative!r} leaves the dataset's root; expected a path below it")
    return str(path)


def build_sample(
    row: Mapping[str, Any],
    dataset: DatasetDescription,
    settings: SampleSettings,
    tokenizer: PreTrainedTokenizerBase,
    open_media: OpenMedia,
    rng: np.random.Generator | None = None,
) -> Sample:
    """Tile, tokenize and label one row that passed preflight's checks of its shape.

    Args:
        rng: decides augmentation and random frames; None: neither is random.

    Raises:
        RowError: an image or video is absent or broken, or its tokens do not fit in the maximum length.
    """
    if dataset.max_tiles is not None:
        settings = replace(settings, max_tiles=dataset.max_tiles)
    conversations = list(row["conversations"])
    groups = _read_media(row, dataset, settings, open_media, rng)
    if groups:
        conversations = _with_marks(conversations, len(groups), is_video="video" in row)
        _check_marks(conversations, len(groups))
    encoded = encode(
        conversations,
        tokenizer,
        settings.template,
        tiles_per_image=[len(group) for group in groups],
        context_tokens=settings.context_tokens,
        compat=settings.compat,
        max_length=settings.max_length,
    )
    tiles = [tile for group in groups for tile in group]
    _check_not_cut(encoded.input_ids, tokenizer, len(tiles) * settings.context_tokens, settings.max_length)
    return Sample(
        input_ids=encoded.input_ids,
        labels=encoded.labels,
        tiles=stack_tiles(tiles or [blank_tile(settings.image_size)]),
        image_flags=np.full(max(1, len(tiles)), 1 if tiles else 0, np.int64),
        findings=encoded.findings,
    )


def _read_media(
    row: Mapping[str, Any],
    dataset: DatasetDescription,
    settings: SampleSettings,
    open_media: OpenMedia,
    rng: np.random.Generator | None,
) -> list[list[Image.Image]]:
    """Tiles of each image or frame, in the order of the row."""
    augment = rng if dataset.data_augment else None
    if "video" in row:
        data = _fetch(dataset.root, row["video"], "video", open_media)
        frames = _frames(data, row, settings, rng)
        return [[_fit(frame, settings, augment)] for frame in frames]
    if "image" not in row:
        return []
    paths = [row["image"]] if isinstance(row["image"], str) else list(row["image"])
    fields = ["image"] if isinstance(row["image"], str) else [f"image[{position}]" for position in range(len(paths))]
    limit = max(1, settings.max_tiles // len(paths))
    groups = []
    for path, name in zip(paths, fields, strict=True):
        try:
            image = decode_image(_fetch(dataset.root, path, name, open_media))
        except ImageProblem as error:
            raise RowError.single("ImageUndecodable", f"{path}: {error}", name) from error
        groups.append(_tiles(image, settings, limit, augment))
    return groups


def _fetch(root: str, relative: str, name: str, open_media: OpenMedia) -> bytes:
    kind = "Video" if name == "video" else "Image"
    try:
        return open_media(root, media_path(relative))
    except ValueError as error:
        raise RowError.single("PathLeavesRoot", str(error), name) from error
    except FileNotFoundError as error:
        raise RowError.single(f"{kind}Missing", f"{relative} is not below {root}", name) from error


def _frames(
    data: bytes, row: Mapping[str, Any], settings: SampleSettings, rng: np.random.Generator | None
) -> list[Image.Image]:
    try:
        return read_frames(
            data,
            min_frames=settings.min_frames,
            max_frames=settings.max_frames,
            sampling=settings.frame_sampling,
            clip=row.get("clip"),
            rng=rng,
        )
    except VideoProblem as error:
        raise RowError.single("VideoUndecodable", f"{row['video']}: {error}", "video") from error


def _tiles(
    image: Image.Image, settings: SampleSettings, max_tiles: int, augment: np.random.Generator | None
) -> list[Image.Image]:
    if not settings.dynamic_tiles:
        return [_fit(image, settings, augment)]
    tiles = cut_tiles(image, settings.image_size, settings.min_tiles, max_tiles, thumbnail=settings.thumbnail)
    return [_fit(tile, settings, augment) for tile in tiles]


def _fit(image: Image.Image, settings: SampleSettings, augment: np.random.Generator | None) -> Image.Image:
    if augment is None:
        return fit_tile(image, settings.image_size, pad_to_square=settings.pad_to_square)
    degraded = degrade_jpeg(image, int(augment.choice(JPEG_QUALITIES)))
    return fit_tile(degraded, settings.image_size)


def _with_marks(conversations: list[Mapping[str, Any]], images: int, *, is_video: bool) -> list[Mapping[str, Any]]:
    """Upstream's help for rows without a mark: it goes before the first question. A video's mark becomes one line a frame."""
    position = next((index for index, turn in enumerate(conversations) if turn["from"] == "human"), 0)
    text = conversations[position]["value"]
    mark = VIDEO_MARK if is_video else IMAGE_MARK
    if (is_video or images == 1) and not any(mark in turn["value"] for turn in conversations):
        text = f"{mark}\n{text}"
    if is_video:
        frames = "\n".join(f"Frame-{number}: {IMAGE_MARK}" for number in range(1, images + 1))
        text = text.replace(f"{VIDEO_MARK}\n", f"{frames}\n")
    changed = list(conversations)
    changed[position] = {**conversations[position], "value": text}
    return changed


def _check_marks(conversations: list[Mapping[str, Any]], images: int) -> None:
    marks = sum(turn["value"].count(IMAGE_MARK) for turn in conversations)
    if marks != images:
        raise RowError([marks_finding(marks, images)])


def marks_finding(marks: int, images: int) -> Finding:
    """The row's `<image>` marks and its images do not match."""
    return Finding(
        "ImageMarkMismatch",
        f"{marks} {IMAGE_MARK} marks for {images} images; expected one mark for each image",
        "conversations",
    )


def _check_not_cut(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, wanted: int, max_length: int) -> None:
    """A row cut in the middle of its images cannot be trained on."""
    found = int((ids == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")).sum())
    if found != wanted:
        raise RowError.single(
            "ImageTokensCut",
            f"its images need {wanted} tokens, of which {found} fit in the maximum length {max_length}; "
            f"raise the maximum length or lower the maximum number of tiles",
            "conversations",
        )

"""From a JSONL row to a Sample: conversation to ids and labels, media to tiles."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from internvl_trainer.data.diagnostics import Finding
from internvl_trainer.data.row_schema import Row, image_fields, images_of, media_path, place_marks, video_of
from internvl_trainer.data.tiling import (
    JPEG_QUALITIES,
    ImageProblem,
    as_image,
    blank_tile,
    cut_tiles,
    decode_image,
    degrade_jpeg,
    fit_tile,
    stack_tiles,
)
from internvl_trainer.data.tokenize import IMAGE_CONTEXT, EncodedRow, encode
from internvl_trainer.data.video import VideoProblem, read_frames
from internvl_trainer.errors import BadFile, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OpenMedia = Callable[[str, str], bytes]
"""(root, relative path) -> the file's bytes; raises FileNotFoundError, or BadFile."""


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

    def source_rows(self, rows: int) -> np.ndarray:
        """Row of the file behind each position of the epoch: a share below 1 keeps the FIRST rows, as upstream does."""
        return (np.arange(self.count_rows(rows)) % rows).astype(np.int32)


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
    """The datasets of a meta JSON as upstream writes it: {name: {root, annotation, repeat_time, ...}}.

    Raises:
        UserError: naming the dataset and the field.
    """
    try:
        meta = json.loads(text, object_pairs_hook=partial(_unique, path))
    except json.JSONDecodeError as error:
        raise UserError(
            "InvalidMeta", f"not valid JSON: {error.msg} (column {error.colno})", f"{path}:{error.lineno}"
        ) from error
    if not isinstance(meta, dict) or not meta:
        raise UserError("InvalidMeta", "expected an object of the form {name: {root, annotation, ...}}", path)
    return [_describe(name, entry, path) for name, entry in meta.items()]


def _unique(path: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON keeps the last of two equal names, and a dataset would be lost without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise UserError("InvalidMeta", f"found {twice!r} twice; rename or remove one", path)
    return found


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


def build_sample(
    row: Row,
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
        RowError: an image or video is absent or broken, its tokens do not fit in the maximum length, or nothing is
            supervised.
    """
    settings = settings_for(dataset, settings)
    groups = read_media(row, dataset, settings, open_media, rng)
    encoded = encode_row(row, [len(group) for group in groups], settings, tokenizer)
    tiles = np.concatenate(groups) if groups else stack_tiles([blank_tile(settings.image_size)])
    return Sample(
        input_ids=encoded.input_ids,
        labels=encoded.labels,
        tiles=tiles,
        image_flags=np.full(len(tiles), 1 if groups else 0, np.int64),
        findings=encoded.findings,
    )


def settings_for(dataset: DatasetDescription, settings: SampleSettings) -> SampleSettings:
    """The run's settings with the dataset's own number of tiles."""
    return settings if dataset.max_tiles is None else replace(settings, max_tiles=dataset.max_tiles)


def encode_row(
    row: Row, tiles_per_image: list[int], settings: SampleSettings, tokenizer: PreTrainedTokenizerBase
) -> EncodedRow:
    """Ids and labels of a row whose images (or frames) have so many tiles.

    Raises:
        RowError: nothing is supervised, or the maximum length cuts through the images.
    """
    encoded = encode(
        place_marks(row, frames=len(tiles_per_image)),
        tokenizer,
        settings.template,
        tiles_per_image=tiles_per_image,
        context_tokens=settings.context_tokens,
        compat=settings.compat,
        max_length=settings.max_length,
    )
    context = int((encoded.input_ids == tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)).sum())
    if context != (wanted := sum(tiles_per_image) * settings.context_tokens):
        raise RowError.single(
            "ImageTokensCut",
            f"its images need {wanted} tokens, of which {context} fit in the maximum length {settings.max_length}; "
            f"raise the maximum length or lower the maximum number of tiles",
            "conversations",
        )
    if errors := [finding for finding in encoded.findings if finding.severity == "error"]:
        raise RowError(errors)
    return encoded


def read_media(
    row: Row,
    dataset: DatasetDescription,
    settings: SampleSettings,
    open_media: OpenMedia,
    rng: np.random.Generator | None = None,
) -> list[np.ndarray]:
    """(n, 3, S, S) uint8 tiles of each image or frame, in the order of the row. Raises RowError."""
    augment = rng if dataset.data_augment else None
    if video := video_of(row):
        data = fetch_media(dataset.root, video, "video", open_media)
        return [stack_tiles([_fit(frame, settings, augment)]) for frame in _frames(data, row, settings, rng)]
    paths = images_of(row)
    limit = max(1, settings.max_tiles // max(1, len(paths)))
    groups = []
    for path, name in zip(paths, image_fields(row), strict=True):
        try:
            image = decode_image(fetch_media(dataset.root, path, name, open_media))
        except ImageProblem as error:
            raise RowError.single("ImageUndecodable", f"{path}: {error}", name) from error
        groups.append(_tiles(image, settings, limit, augment))
    return groups


def fetch_media(root: str, relative: str, name: str, open_media: OpenMedia) -> bytes:
    """A file of a row. Raises RowError (PathLeavesRoot, …Missing, …Unreadable) for the field `name`."""
    kind = "Video" if name == "video" else "Image"
    try:
        path = media_path(relative)
    except ValueError as error:
        raise RowError.single("PathLeavesRoot", str(error), name) from error
    try:
        return open_media(root, path)
    except FileNotFoundError as error:
        raise RowError.single(f"{kind}Missing", f"{relative} is not below {root}", name) from error
    except BadFile as error:
        raise RowError.single(f"{kind}Unreadable", error.message, name) from error


def _frames(data: bytes, row: Row, settings: SampleSettings, rng: np.random.Generator | None) -> list[Image.Image]:
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
) -> np.ndarray:
    if not settings.dynamic_tiles:
        return stack_tiles([_fit(image, settings, augment)])
    tiles = cut_tiles(image, settings.image_size, settings.min_tiles, max_tiles, thumbnail=settings.thumbnail)
    return tiles if augment is None else stack_tiles([_fit(as_image(tile), settings, augment) for tile in tiles])


def _fit(image: Image.Image, settings: SampleSettings, augment: np.random.Generator | None) -> Image.Image:
    if augment is None:
        return fit_tile(image, settings.image_size, pad_to_square=settings.pad_to_square)
    degraded = degrade_jpeg(image, int(augment.choice(JPEG_QUALITIES)))
    return fit_tile(degraded, settings.image_size)

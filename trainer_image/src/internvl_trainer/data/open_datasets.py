"""The datasets of a run, from the spec and a meta JSON, with their annotation files fetched and indexed."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from internvl_api.address import Address, credentials_message, has_credentials
from internvl_api.run_config import RunConfig
from internvl_api.spec import Dataset

from internvl_trainer.artifacts.sources import fetch_file, meta_path, parent_uri
from internvl_trainer.data.dataset_meta import DatasetDescription, read_meta
from internvl_trainer.data.diagnostics import Finding
from internvl_trainer.data.formats.open_source import open_source
from internvl_trainer.data.formats.source import RowSource, media_opener, read_row, shards_of
from internvl_trainer.data.media import OpenMedia
from internvl_trainer.data.pictures import Decoding
from internvl_trainer.data.row_schema import ChatRow
from internvl_trainer.data.sample import SampleSettings
from internvl_trainer.errors import UserError

VALIDATION = "validation/"
"""Prefix of a held-out dataset's name wherever datasets of both kinds are listed."""


@dataclass(frozen=True)
class OpenDataset:
    """A dataset whose rows can be read; `description` holds the user's URIs.

    Attributes:
        taken_for: kind of the rows and what they are in, in words.
    """

    description: DatasetDescription
    index: RowSource
    taken_for: str = "chat rows in JSON Lines"

    @property
    def path(self) -> Path:
        """The annotation file on this machine."""
        return self.index.path

    @property
    def shards(self) -> list[Path]:
        """Every file of the annotation on this machine."""
        return shards_of(self.index)

    def parse_row(self, row: int) -> tuple[ChatRow | None, list[Finding]]:
        """Row number `row` of the file, as `read_row` gives it."""
        return read_row(self.index, row, self.description.annotation)

    def media_opener(self, elsewhere: OpenMedia) -> OpenMedia:
        """The OpenMedia of its rows; `elsewhere` opens media that the annotation does not store."""
        return media_opener(self.index, elsewhere)

    def epoch_rows(self, bad_lines: Sequence[int] = ()) -> np.ndarray:
        """(n,) int32 rows of one epoch, in the file's order: repeatTime applied, every row of a bad line left out."""
        count = len(self.index)
        rows = self.description.source_rows(count)
        bad = [row for line in bad_lines for row in self._rows_of_line(line)]
        return rows[~np.isin(rows, bad)] if bad else rows

    def _rows_of_line(self, line: int) -> range:
        """The rows of a line: one, or one for each caption of a list."""
        every, number_of = range(len(self.index)), self.index.line_number
        return range(bisect.bisect_left(every, line, key=number_of), bisect.bisect_right(every, line, key=number_of))


def open_datasets(config: RunConfig) -> list[OpenDataset]:
    """Fetch and index every annotation file. Raises UserError naming the dataset's field or file."""
    return [_open(description, field) for description, field in describe_datasets(config)]


def open_validation(config: RunConfig) -> list[OpenDataset]:
    """Fetch and index every annotation file of data.validation, under names with the prefix VALIDATION."""
    return [_open(description, field) for description, field in describe_validation(config)]


def describe_datasets(config: RunConfig) -> list[tuple[DatasetDescription, str]]:
    """Every training dataset of the spec and of the meta JSON, each with the field to name in errors."""
    data = config.data
    described = _described("train", data.train, "meta", data.meta, data.meta_root)
    if reserved := next((each for each in described if each[0].name.startswith(VALIDATION)), None):
        name, place = reserved[0].name, reserved[1]
        message = f"found {name!r}; names that begin with {VALIDATION} are data.validation's own, so rename it"
        raise UserError("DatasetNameReserved", message, place)
    return described


def describe_validation(config: RunConfig) -> list[tuple[DatasetDescription, str]]:
    """Every dataset of data.validation with its prefixed name, each with the field to name in errors."""
    data = config.data
    described = _described("validation", data.validation, "validationMeta", data.validation_meta, data.meta_root)
    return [(replace(each, name=f"{VALIDATION}{each.name}"), place) for each, place in described]


def _described(
    section: str, datasets: Mapping[str, Dataset], meta_section: str, meta: str | None, meta_root: str | None
) -> list[tuple[DatasetDescription, str]]:
    """The datasets of a section of spec.data and of its meta JSON, each with the field to name in errors."""
    described = [(_from_spec(name, dataset), f"spec.data.{section}.{name}") for name, dataset in datasets.items()]
    field = f"spec.data.{meta_section}"
    for description in _read_meta(meta, meta_root, field):
        if description.name in datasets:
            message = f"found dataset {description.name!r} in {meta_section} and in {section}; rename one"
            raise UserError("DatasetTwice", message, field)
        described.append((description, f"{field}: {description.name}"))
    return described


def sample_settings(config: RunConfig, *, template: str, image_size: int, context_tokens: int) -> SampleSettings:
    """Settings from the spec; the arguments are the checkpoint's, for what the spec leaves open."""
    image, tiling = config.image, config.image.tiling
    return SampleSettings(
        template=config.model.template or template,
        image_size=image_size,
        context_tokens=context_tokens,
        dynamic_tiles=tiling.dynamic,
        min_tiles=tiling.min_tiles,
        max_tiles=tiling.max_tiles,
        thumbnail=tiling.thumbnail,
        min_frames=image.video_frames,
        max_frames=image.video_frames,
        max_length=config.training.max_seq_length,
        compat=config.data.compat,
        decoding=picture_decoding(config),
    )


def picture_decoding(config: RunConfig) -> Decoding:
    """How the run decodes pictures, for chat and retrieval models, training and evaluation alike."""
    return Decoding.of(config.image.exif, config.image.background, config.data.compat)


def _from_spec(name: str, dataset: Dataset) -> DatasetDescription:
    return DatasetDescription(
        name=name,
        root=dataset.root or parent_uri(dataset.annotation),
        annotation=dataset.annotation,
        max_tiles=dataset.max_dynamic_patch,
        repeat_time=dataset.repeat_time,
        data_augment=dataset.data_augment,
        length=dataset.length,
        format=dataset.format,
        questions=dataset.questions,
        weight=dataset.weight,
    )


def _read_meta(uri: str | None, root: str | None, field: str) -> list[DatasetDescription]:
    """The datasets of a meta JSON, if there is one; relative paths start at `root`, else at its folder."""
    if uri is None:
        return []
    try:
        text = fetch_file(uri, field=field).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("InvalidMeta", f"not valid UTF-8 (byte {error.start})", uri) from error

    def absolute(path: str) -> Address:
        if has_credentials(path):
            raise UserError("InvalidMeta", credentials_message(path), uri)
        return meta_path(path, uri, root)

    return [
        replace(description, root=absolute(description.root), annotation=absolute(description.annotation))
        for description in read_meta(text, uri)
    ]


def _open(description: DatasetDescription, field: str) -> OpenDataset:
    opened = open_source(description.annotation, description.format, field=field, questions=description.questions)
    return OpenDataset(description, opened.rows, opened.taken_for)


def estimate_lengths(rows: Iterable[bytes], image_tokens: int) -> np.ndarray:
    """(n,) int64 estimated tokens of raw rows: four bytes a token, plus `image_tokens` for a row with media."""
    return np.array(
        [len(row) // 4 + image_tokens * (b'"image"' in row or b'"video"' in row) for row in rows], dtype=np.int64
    )

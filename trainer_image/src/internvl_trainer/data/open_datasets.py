"""The datasets of a run: those of the spec and of a meta JSON, their annotation files here and indexed."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from internvl_api.run_config import RunConfig
from internvl_api.spec import Dataset

from internvl_trainer.artifacts.identity import fingerprint, stage_folder
from internvl_trainer.artifacts.manifest import read_manifest
from internvl_trainer.artifacts.sources import fetch_file, parent_uri
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.data.index import RowIndex
from internvl_trainer.data.sample import DatasetDescription, SampleSettings, read_meta
from internvl_trainer.errors import UserError

VALIDATION = "validation/"
"""Before a held-out dataset's name wherever datasets of both kinds are listed."""


@dataclass(frozen=True)
class OpenDataset:
    """A dataset with its rows at hand. `description.annotation` and `.root` are the user's URIs."""

    description: DatasetDescription
    index: RowIndex

    @property
    def path(self) -> Path:
        """Of the annotation file on this machine."""
        return self.index.path

    def epoch_rows(self, bad_lines: Sequence[int] = ()) -> np.ndarray:
        """(n,) int32 rows of one epoch, in the file's order: repeatTime applied, bad lines left out."""
        count = len(self.index)
        rows = self.description.source_rows(count)
        bad = [bisect.bisect_left(range(count), line, key=self.index.line_number) for line in bad_lines]
        return rows[~np.isin(rows, bad)] if bad else rows


def open_datasets(config: RunConfig) -> list[OpenDataset]:
    """Fetch and index every annotation file. Raises UserError naming the dataset's field or file."""
    return [_open(description, field) for description, field in describe_datasets(config)]


def open_validation(config: RunConfig) -> list[OpenDataset]:
    """The same for data.validation, under names that tell them from training's. Raises UserError."""
    return [_open(description, field) for description, field in describe_validation(config)]


def describe_datasets(config: RunConfig) -> list[tuple[DatasetDescription, str]]:
    """Every dataset of the spec and of the meta JSON, with the field to name in errors."""
    described = {
        name: (_from_spec(name, dataset), f"spec.data.train.{name}") for name, dataset in config.data.train.items()
    }
    for description in _read_meta(config.data.meta) if config.data.meta else ():
        if description.name in described:
            raise UserError(
                "DatasetTwice", f"found dataset {description.name!r} in meta and in train; rename one", "spec.data.meta"
            )
        described[description.name] = description, f"spec.data.meta: {description.name}"
    if reserved := next((name for name in described if name.startswith(VALIDATION)), None):
        message = f"found {reserved!r}; names that begin with {VALIDATION} are data.validation's own, so rename it"
        raise UserError("DatasetNameReserved", message, described[reserved][1])
    return list(described.values())


def describe_validation(config: RunConfig) -> list[tuple[DatasetDescription, str]]:
    """Every dataset of data.validation under its longer name, with the field to name in errors."""
    return [
        (replace(_from_spec(name, dataset), name=f"{VALIDATION}{name}"), f"spec.data.validation.{name}")
        for name, dataset in config.data.validation.items()
    ]


def sample_settings(config: RunConfig, *, template: str, image_size: int, context_tokens: int) -> SampleSettings:
    """How a row becomes a sample; what the spec leaves open comes from the checkpoint."""
    image = config.image
    return SampleSettings(
        template=config.model.template or template,
        image_size=image_size,
        context_tokens=context_tokens,
        dynamic_tiles=image.dynamic,
        min_tiles=image.min_dynamic_patch,
        max_tiles=image.max_dynamic_patch,
        thumbnail=image.thumbnail,
        min_frames=image.video_frames,
        max_frames=image.video_frames,
        max_length=config.training.max_seq_length,
        compat=config.data.compat,
    )


def read_bad_lines(config: RunConfig, storage: Storage) -> dict[str, list[int]]:
    """Dataset to lines that preflight told to skip; empty without `badRows: skip`."""
    if config.data.bad_rows != "skip":
        return {}
    folder = stage_folder("preflight")
    manifest = read_manifest(storage, folder)
    if manifest is None or manifest.fingerprint != fingerprint(config, "preflight"):
        raise UserError("PreflightMissing", "badRows: skip needs the list of the preflight stage; run it first")
    lines: dict[str, list[int]] = json.loads(storage.read(f"{folder}/preflight.json"))["skippedLines"]
    return lines


def _from_spec(name: str, dataset: Dataset) -> DatasetDescription:
    return DatasetDescription(
        name=name,
        root=dataset.root or parent_uri(dataset.annotation),
        annotation=dataset.annotation,
        max_tiles=dataset.max_dynamic_patch,
        repeat_time=dataset.repeat_time,
        data_augment=dataset.data_augment,
        length=dataset.length,
    )


def _read_meta(uri: str) -> list[DatasetDescription]:
    """Relative paths of a meta JSON start at its own folder."""
    try:
        text = fetch_file(uri, field="spec.data.meta").read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("InvalidMeta", f"not valid UTF-8 (byte {error.start})", uri) from error

    def absolute(path: str) -> str:
        return path if path.startswith("/") or "://" in path else f"{parent_uri(uri)}/{path}".rstrip("/")

    return [
        replace(description, root=absolute(description.root), annotation=absolute(description.annotation))
        for description in read_meta(text, uri)
    ]


def _open(description: DatasetDescription, field: str) -> OpenDataset:
    path = fetch_file(description.annotation, field=f"{field}.annotation")
    try:
        return OpenDataset(description, RowIndex.build(path))
    except UserError as error:  # say the user's URI, not the place in the cache
        raise UserError(error.reason, error.message, description.annotation) from error


def estimate_lengths(rows: Iterable[bytes], image_tokens: int) -> np.ndarray:
    """(n,) rough tokens of raw rows: four bytes a token, and `image_tokens` where there is a picture or video."""
    return np.array(
        [len(row) // 4 + image_tokens * (b'"image"' in row or b'"video"' in row) for row in rows], dtype=np.int64
    )

"""Descriptions of datasets, and the meta JSON that upstream lists them in."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from internvl_api.types import DataFormat
from internvl_api.validation.suggest import did_you_mean

from ..errors import UserError
from ..json_text import InvalidJson, parse_json
from .tiling import MOST_TILES

_LARGEST_NUMBER = 1e9

_FIELDS = ("root", "annotation", "data_augment", "max_dynamic_patch", "repeat_time", "length")


@dataclass(frozen=True)
class DatasetDescription:
    """One dataset of the spec, or one entry of a meta JSON.

    Attributes:
        root: folder or URI that the rows' paths are relative to.
        annotation: path or URI of the JSONL or caption file.
        max_tiles: tiles of an image; None uses the run's setting.
        repeat_time: how often an epoch uses the file; below 1 it uses that share, from the start of the file.
        length: rows that the user expects in the file; None is not checked.
        format: kind of the rows.
        questions: VQAv2's questions file.
        weight: share of an epoch, relative to the other datasets; None: each row once.
    """

    name: str
    root: str
    annotation: str
    max_tiles: int | None = None
    repeat_time: float = 1.0
    data_augment: bool = False
    length: int | None = None
    format: DataFormat = "auto"
    questions: str | None = None
    weight: float | None = None

    def count_rows(self, rows: int) -> int:
        """Rows in one epoch of a file with `rows` rows."""
        return int(rows * self.repeat_time)

    def source_rows(self, rows: int) -> np.ndarray:
        """(n,) int32 row of the file at each position of the epoch, for a file with `rows` rows."""
        return (np.arange(self.count_rows(rows)) % rows).astype(np.int32)


def read_meta(text: str, path: str) -> list[DatasetDescription]:
    """The datasets of a meta JSON in upstream's form: {name: {root, annotation, repeat_time, ...}}.

    Raises:
        UserError: naming the dataset and the field.
    """
    try:
        meta = parse_json(text, path, pairs=partial(_refuse_duplicates, path))
    except InvalidJson as error:
        raise UserError("InvalidMeta", error.message, error.where) from error
    if not isinstance(meta, dict) or not meta:
        raise UserError("InvalidMeta", "expected an object of the form {name: {root, annotation, ...}}", path)
    return [_describe(name, entry, path) for name, entry in meta.items()]


def _refuse_duplicates(path: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON keeps the last of two equal names, so a dataset would be lost silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise UserError("InvalidMeta", f"found {twice!r} twice; rename or remove one", path)
    return found


def _describe(name: str, entry: Any, path: str) -> DatasetDescription:
    if not isinstance(entry, dict):
        raise UserError("InvalidMeta", f"expected an object, found {type(entry).__name__}", f"{path}: {name}")

    if unknown := next((key for key in entry if key not in _FIELDS), None):
        hint = did_you_mean(unknown, _FIELDS)
        message = f"the field is not known{hint}; expected some of {', '.join(_FIELDS)}"
        raise UserError("InvalidMeta", message, f"{path}: {name}.{unknown}")

    def take(key: str, kinds: tuple[type, ...], expected: str, default: Any = None) -> Any:
        value = entry.get(key, default)
        if value is None and default is None and key not in ("root", "annotation"):
            return None
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            found = "nothing" if key not in entry else _short(value)
            raise UserError("InvalidMeta", f"expected {expected}, found {found}", f"{path}: {name}.{key}")
        return value

    description = DatasetDescription(
        name=name,
        root=take("root", (str,), "a path"),
        annotation=take("annotation", (str,), "the path of a JSONL file"),
        max_tiles=take("max_dynamic_patch", (int,), "a whole number"),
        repeat_time=_finite(take("repeat_time", (int, float), "a number", 1), f"{path}: {name}.repeat_time"),
        data_augment=take("data_augment", (bool,), "true or false", False),
        length=take("length", (int,), "a whole number"),
    )
    for key, value in (("repeat_time", description.repeat_time), ("max_dynamic_patch", description.max_tiles)):
        if value is not None and value <= 0:
            raise UserError(
                "InvalidMeta", f"expected a number above 0, found {_short(entry[key])}", f"{path}: {name}.{key}"
            )
    if (description.max_tiles or 0) > MOST_TILES:
        message = f"expected at most {MOST_TILES}, found {_short(entry['max_dynamic_patch'])}"
        raise UserError("InvalidMeta", message, f"{path}: {name}.max_dynamic_patch")
    if description.repeat_time > 1 and not description.repeat_time.is_integer():
        raise UserError(
            "InvalidMeta",
            f"above 1 expected a whole number, found {entry['repeat_time']}",
            f"{path}: {name}.repeat_time",
        )
    return description


def _finite(value: float, place: str) -> float:
    if not -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER:  # also false for NaN
        raise UserError("InvalidMeta", f"expected a number up to {_LARGEST_NUMBER:g}, found {_short(value)}", place)
    return float(value)


def _short(value: object) -> str:
    return json.dumps(value)[:200]

"""Make the relative paths of a spec or a run.yaml absolute: they start at the folder of the file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_DATASET = ("annotation", "questions", "root")
PATH_FIELDS = (
    "output",
    "model.source",
    "model.adapter",
    "data.meta",
    "data.metaRoot",
    "data.validationMeta",
    "data.preflight.cache",
    *(f"data.{section}.*.{part}" for section in ("train", "validation") for part in _DATASET),
    *(f"evaluation.tasks.*.{part}" for part in ("annotation", "root")),
)
"""Fields of a spec and of run.yaml that hold an address or a path; `*` is any name."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")  # also one that is mistyped, such as s3:/bucket
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def with_absolute_paths(spec: object, folder: Path) -> object:
    """`spec` with its relative paths made absolute, in place; anything but an object is returned as it is.

    A model's `owner/name` stays, and is refused later with a hint to the Hub, unless such a folder exists.
    """
    folder = folder.absolute()
    for field in PATH_FIELDS:
        for place, key in _places(spec, field.split(".")):
            value = place[key]
            if not isinstance(value, str) or not value or value.startswith("/") or _SCHEME.match(value):
                continue
            path = folder / value
            if field != "model.source" or path.exists() or not _HUB_NAME.fullmatch(value):
                place[key] = _normal(path) + ("/" if value.endswith("/") else "")
    return spec


def _normal(path: Path) -> str:
    """The path without `.`, and without `..` where no link is in the way."""
    return str(path.resolve() if ".." in path.parts else path)


def _places(value: Any, parts: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects and keys that a field's path leads to."""
    first, *rest = parts
    if not isinstance(value, dict):
        return
    for key in value if first == "*" else [first] if first in value else []:
        if rest:
            yield from _places(value[key], rest)
        elif isinstance(key, str):
            yield value, key

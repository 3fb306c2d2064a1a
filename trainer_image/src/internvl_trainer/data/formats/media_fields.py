"""The pictures and videos that a record names, under any of the usual names."""

from __future__ import annotations

from typing import Any

from ..diagnostics import RowError
from ..media_names import STORED
from .source import Record

KINDS = ("image", "video")
_NAMES = {
    "image": ("images", "image", "image_path", "image_paths", "image_file", "img", "Image"),
    "video": ("videos", "video", "video_path", "Video"),
}
MEDIA_NAMES = frozenset(name for names in _NAMES.values() for name in names)


def media_of(record: Record) -> dict[str, list[str]]:
    """Paths by kind. Raises RowError for a field that holds no path, or for two fields of one kind."""
    return {kind: _paths(record, kind) for kind in KINDS}


def refuse_unread_media(record: Record) -> None:
    """Raises RowError when bytes are stored under other names alone: the row would lose its picture or video."""
    stored = [name for name, value in record.items() if is_stored(value)]
    if not stored or any(record.get(name) for name in MEDIA_NAMES) or _names_media(record.get("messages")):
        return
    message = "it holds bytes and is not read; name the column `image` or `video`, or leave it out"
    raise RowError.single("FieldUnsupported", message, stored[0])


def is_stored(value: Any) -> bool:
    """Whether a field's value is media that the annotation itself holds."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, str) and first.startswith(STORED)


def _names_media(messages: Any) -> bool:
    """Whether the content of a message is a list of parts, which may be media."""
    turns = messages if isinstance(messages, list) else []
    return any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in turns)


def entry_path(entry: Any) -> str | None:
    """The path of an entry: text, or the `path` or `url` of an object; None without one."""
    if isinstance(entry, dict):
        entry = next((entry[key] for key in ("path", "url") if entry.get(key)), None)
    if not isinstance(entry, str) or not entry:
        return None
    return entry.removeprefix("./")


def _paths(record: Record, kind: str) -> list[str]:
    named = [name for name in _NAMES[kind] if record.get(name)]
    if not named:
        return []
    if len(named) > 1:
        message = f"found {named[0]} and {named[1]}; keep one of them"
        raise RowError.single(f"{kind.capitalize()}Invalid", message, named[1])
    value = record[named[0]]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]  # the frames of one video
    paths = []
    for position, entry in enumerate(value if isinstance(value, list) else [value]):
        path = entry_path(entry)
        if path is None:
            field = f"{named[0]}[{position}]" if isinstance(value, list) else named[0]
            raise RowError.single(f"{kind.capitalize()}Invalid", "expected a path", field)
        paths.append(path)
    return paths

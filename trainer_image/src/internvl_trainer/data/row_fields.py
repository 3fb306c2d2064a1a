"""The names of a row's fields: the known ones, and suggestions for unknown ones."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .diagnostics import Finding

ROW_FIELDS = ("image", "video", "clip", "conversations", "system")
TURN_FIELDS = ("from", "value")

_NOTES = {
    *("id", "width", "height", "length", "source", "dataset", "data_source", "task", "type", "category", "split"),
    *("width_list", "height_list", "meta", "metadata", "license", "language", "question_id", "image_id", "video_id"),
}
"""Known fields of published datasets that training does not need."""

_WORDS = {
    **dict.fromkeys(("image", "img", "picture", "pic", "photo"), "image"),
    **dict.fromkeys(("video", "movie"), "video"),
    **dict.fromkeys(("conversation", "message", "dialog", "dialogue", "chat", "turn"), "conversations"),
    "prompt": "system",
}
_FOREIGN_MARK = re.compile(
    r"<(?:image|video)(?:[ _-]?(?:\d+|here|pad|token|placeholder))?/?>"
    r"|<\|(?:image|video)(?:_?\d+|_pad)?\|>",
    re.IGNORECASE,
)
_CLOSE = 0.79  # 'imgae' is close to 'image', 'image_id' is not
_PLACES = {"", "path", "file", "filename", "name", "url", "uri", "list", "src", "bytes", "data", "base64"}


def check_row_fields(row: Mapping[str, Any]) -> Iterator[Finding]:
    """A finding for each unknown field: an error where the row loses media or turns by it, else a warning."""
    for name, value in row.items():
        if name in ROW_FIELDS or value in (None, "", [], {}):
            continue
        meant = _meant_field(name)
        if meant is None:
            if name.lower() not in _NOTES:
                yield Finding("UnknownField", "the field is not known and not read", name, "warning")
        elif row.get(meant):
            message = f"the field is not read; {meant!r} is, and the row has it"
            yield Finding("UnknownField", message, name, "warning")
        else:
            yield Finding("UnknownField", f"the field is not known; did you mean {meant!r}?", name)


def check_turn_fields(turn: Mapping[str, Any], place: str) -> Iterator[Finding]:
    """A finding for each unknown field of a turn: an error where it holds media, else a warning."""
    for name, value in turn.items():
        if name in TURN_FIELDS or value in (None, "", [], {}):
            continue
        if _meant_field(name) in ("image", "video"):
            message = f"media belong to the row, not to a turn; move them to the row's {_meant_field(name)!r}"
            yield Finding("UnknownField", message, f"{place}.{name}")
        elif "from" in turn and "value" in turn:
            yield Finding("UnknownField", "the field is not known and not read", f"{place}.{name}", "warning")


def check_foreign_marks(text: str, place: str) -> Iterator[Finding]:
    """A warning for the first mark of another tool in a question, which stands for no medium here."""
    marks = (mark[0] for mark in _FOREIGN_MARK.finditer(text) if mark[0] not in ("<image>", "<video>"))
    if found := next(marks, None):
        message = f"found {found}, a mark of another tool, which stays text; write <image> or <video>"
        yield Finding("ForeignMark", message, place, "warning")


def hint_turn_field(turn: Mapping[str, Any], wanted: str) -> str:
    """` (did you mean ...)` where another tool's name for `wanted` is in the turn, else ""."""
    foreign = {"from": ("role", "speaker"), "value": ("content", "text")}[wanted]
    found = next((name for name in foreign if name in turn), None)
    return f" (did you mean {wanted!r} where the turn has {found!r}?)" if found else ""


def _meant_field(name: str) -> str | None:
    """The known field that a name resembles (spelling, plural, suffix); None without one."""
    if name.lower() in _NOTES:
        return None
    first, *rest = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().replace("-", "_").split("_")
    word = _WORDS.get(first) or _WORDS.get(first.removesuffix("s"))
    if first == "system" and rest in ([], ["prompt"], ["message"]):
        return "system"
    if word and word != "system" and all(part.removesuffix("s") in _PLACES for part in rest):
        return word
    return next(iter(difflib.get_close_matches(name.lower(), ROW_FIELDS, n=1, cutoff=_CLOSE)), None)

"""Conversations of ShareGPT, OpenAI and ms-swift (`conversations` or `messages`) to upstream's turns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..diagnostics import RowError
from ..media_names import is_video_name
from ..row_schema import IMAGE_MARK, VIDEO_MARK
from .grounding import write_boxes
from .media_fields import KINDS, MEDIA_NAMES, entry_path, is_stored, media_of
from .source import Record

_ROLES = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot", "bing"), "gpt"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_MARKS = {"image": IMAGE_MARK, "video": VIDEO_MARK}
_UNSUPPORTED = ("tools", "audios", "rejected_response", "rejected_messages")
_READ = {*MEDIA_NAMES, *_UNSUPPORTED, "system", "objects", "id", "clip"}
_LEARNED = ("loss", "weight", "train")
"""Fields by which tools leave an answer out of training when they are false or 0."""


def from_sharegpt(record: Record) -> Record:
    """The row of a record with `conversations` in ShareGPT's style."""
    return _convert(record, "conversations")


def from_messages(record: Record) -> Record:
    """The row of a record with `messages` in OpenAI's or ms-swift's style."""
    return _convert(record, "messages")


def finish_row(
    record: Record, turns: list[dict[str, Any]], media: Mapping[str, list[str]], read: Collection[str] = ()
) -> Record:
    """Upstream's row, with pictures marked where no text does; fields that are not read stay, for the checks.

    Args:
        read: fields of the record beyond `_READ` that `turns` come from.

    Raises:
        RowError: the record has fields whose meaning would be lost.
    """
    for name in _UNSUPPORTED:
        if record.get(name):
            raise RowError.single("FieldUnsupported", "training cannot use this field; remove it", name)
    system = record.get("system")
    row: Record = {key: record[key] for key in ("id", "clip") if record.get(key) is not None}
    if isinstance(system, str) and system and not any(turn["from"] == "system" for turn in turns):
        turns.insert(0, {"from": "system", "value": system})
    elif system:
        row["system"] = system
    row |= {key: record[key] for key in record if key not in _READ and key not in read and not is_stored(record[key])}
    images, videos = media["image"], media["video"]
    if len(videos) > 1 and any(map(is_video_name, videos)):
        raise RowError.single("VideoInvalid", f"found {len(videos)} videos; a row has one", "videos")
    if images:
        row["image"] = images[0] if len(images) == 1 else images
    if videos:
        row["video"] = videos[0] if len(videos) == 1 else videos
    _place_missing_marks(turns, len(images))
    return {**row, "conversations": turns}


def _place_missing_marks(turns: list[dict[str, Any]], images: int) -> None:
    """As ms-swift: several pictures without any mark stand before the first question."""
    first = next((turn for turn in turns if turn["from"] == "human"), None)
    if images > 1 and first is not None and not any(IMAGE_MARK in turn["value"] for turn in turns):
        first["value"] = f"{IMAGE_MARK}\n" * images + first["value"]


@dataclass
class _Inline:
    """The media of a record and of its content lists, in the order of their marks."""

    rows: dict[str, list[str]]
    found: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    unnamed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def name(self, kind: str, part: Mapping[str, Any], place: str) -> None:
        """Take the medium of a part: the one it names, else the row's next."""
        named = next((part[key] for key in (kind, f"{kind}_url", "url", "path") if part.get(key)), None)
        frames = [entry_path(each) for each in named] if kind == "video" and isinstance(named, list) else []
        if frames and None not in frames:
            self.found[kind] += [frame for frame in frames if frame]
        elif path := entry_path(named):
            self.found[kind].append(path)
        else:
            self._take_next(kind, place)

    def _take_next(self, kind: str, place: str) -> None:
        """Use the row's next picture or video for this part; the frames of a video are taken together."""
        left = self.rows[kind][self.unnamed[kind] :]
        if not left:
            message = f"found no {kind} for this part; name it here or in `{kind}s`"
            raise RowError.single(f"{kind.capitalize()}Missing", message, place)
        taken = left if kind == "video" and not any(map(is_video_name, left)) else left[:1]
        self.found[kind] += taken
        self.unnamed[kind] += len(taken)

    def all(self) -> dict[str, list[str]]:
        """Media of the parts when there are any, else the row's."""
        for kind in KINDS:
            if self.found[kind] and self.unnamed[kind] < len(self.rows[kind]):
                message = (
                    f"the content names {len(self.found[kind])} {kind}s, and `{kind}s` has others; use one of them"
                )
                raise RowError.single(f"{kind.capitalize()}Invalid", message, f"{kind}s")
        return {kind: self.found[kind] or self.rows[kind] for kind in KINDS}


def _convert(record: Record, key: str) -> Record:
    found = record.get(key)
    if not isinstance(found, list):
        message = "expected a list of turns, found nothing" if found is None else "expected a list of turns"
        raise RowError.single("ConversationsMissing", message, key)
    inline = _Inline(media_of(record))
    turns = list(_turns(found, key, inline))
    return finish_row(record, write_boxes(record, turns), inline.all(), read=(key,))


def _turns(found: list[Any], key: str, inline: _Inline) -> Iterator[dict[str, Any]]:
    for position, turn in enumerate(found):
        place = f"{key}[{position}]"
        if not isinstance(turn, dict):
            raise RowError.single("TurnInvalid", "expected an object with a role and a text", place)
        role_key = "from" if "from" in turn else "role"
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in _ROLES:
            message = f"found {role!r}; expected user, assistant or system"
            raise RowError.single("UnknownRole", message, f"{place}.{role_key}")
        left_out = [name for name in _LEARNED if turn.get(name) in (False, 0)]
        if turn.get("tool_calls") or left_out:
            name = left_out[0] if left_out else "tool_calls"
            raise RowError.single("FieldUnsupported", "training cannot use this field; remove it", f"{place}.{name}")
        text_key = "value" if "value" in turn else "content"
        read = (role_key, text_key, "tool_calls", *_LEARNED)
        text = _text(turn.get(text_key), f"{place}.{text_key}", inline)
        yield {"from": _ROLES[role], "value": text} | {name: turn[name] for name in turn if name not in read}


def _text(content: Any, place: str, inline: _Inline) -> str:
    """A turn's text; a picture or video among its parts becomes a mark and a newline."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError.single("ValueNotText", "expected text or a list of parts", place)
    text = ""
    for position, part in enumerate(content):
        where = f"{place}[{position}]"
        kind = str(part.get("type")).removesuffix("_url") if isinstance(part, dict) else None
        if isinstance(part, str):
            text += part
        elif kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in KINDS:
            inline.name(kind, part, where)
            text += f"{_MARKS[kind]}\n"
        else:
            raise RowError.single("ValueNotText", "expected a part of type text, image, image_url or video", where)
    return text

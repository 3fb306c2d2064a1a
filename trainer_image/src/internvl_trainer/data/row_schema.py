"""A JSONL line to a row, checked field by field; what it says about images, videos and turns. No media, no tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from internvl_trainer.data.diagnostics import Finding

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
ROLES = ("human", "gpt", "system")

Row = Mapping[str, Any]
Turns = Sequence[Mapping[str, Any]]


def parse_row(line: bytes) -> tuple[Row | None, list[Finding]]:
    """The row, or None when the line is no JSON object; findings of its shape either way."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return None, [Finding("InvalidJson", f"not valid JSON: {error.msg} (column {error.colno})")]
    except UnicodeDecodeError as error:
        return None, [Finding("InvalidJson", f"not valid UTF-8 (byte {error.start})")]
    except RecursionError:
        return None, [Finding("InvalidJson", "nested too deeply to be read")]
    if not isinstance(row, dict):
        return None, [Finding("NotAnObject", f"expected a JSON object, found {_kind(row)}")]
    findings = [*_check_turns(row), *_check_media(row)]
    if not any(finding.severity == "error" for finding in findings):
        findings += _check_marks(row)
    return row, findings


def images_of(row: Row) -> list[str]:
    """Relative paths; empty for a text-only row (upstream also takes an empty list or text for none)."""
    image = row.get("image")
    if not image:
        return []
    return [image] if isinstance(image, str) else list(image)


def image_fields(row: Row) -> list[str]:
    """The name of each image's field, for messages."""
    images = images_of(row)
    if images and isinstance(row["image"], str):
        return ["image"]
    return [f"image[{position}]" for position in range(len(images))]


def video_of(row: Row) -> str | None:
    """Relative path."""
    return row.get("video") or None


def media_path(relative: str) -> str:
    """A path of a row, checked to stay inside the dataset's root.

    Raises:
        ValueError: it is absolute, a URL, or climbs out.
    """
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or "://" in relative or "\0" in relative or not path.parts:
        raise ValueError(f"{relative!r} leaves the dataset's root; expected a path below it")
    return str(path)


def place_marks(row: Row, frames: int = 0) -> list[Mapping[str, Any]]:
    """The row's turns with one `<image>` mark for each image or frame.

    Upstream puts the mark of a row's only image, or of its video, before the first question when it is nowhere, and
    turns a video's mark into one line for each frame.
    """
    turns = list(row["conversations"])
    video, images = video_of(row), images_of(row)
    mark = IMAGE_MARK if images else VIDEO_MARK
    has_one = len(images) == 1 or (video and not images)
    if has_one and not any(mark in turn["value"] for turn in turns):
        first = next((index for index, turn in enumerate(turns) if turn["from"] == "human"), 0)
        turns[first] = {**turns[first], "value": f"{mark}\n{turns[first]['value']}"}
    if video and not images:
        lines = "\n".join(f"Frame-{number}: {IMAGE_MARK}" for number in range(1, frames + 1))
        turns = [{**turn, "value": re.sub(rf"{VIDEO_MARK}\n?", f"{lines}\n", turn["value"])} for turn in turns]
    return turns


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _check_turns(row: Row) -> Iterator[Finding]:
    turns = row.get("conversations")
    if "conversations" not in row:
        yield Finding("ConversationsMissing", "expected a list of turns, found nothing", "conversations")
    elif not isinstance(turns, list):
        yield Finding("ConversationsMissing", f"expected a list of turns, found {_kind(turns)}", "conversations")
    elif not turns:
        yield Finding("ConversationsEmpty", "the list of turns is empty", "conversations")
    else:
        broken = [finding for position, turn in enumerate(turns) for finding in _check_turn(turn, position)]
        yield from broken or _check_order(turns)


def _check_turn(turn: Any, position: int) -> Iterator[Finding]:
    place = f"conversations[{position}]"
    if not isinstance(turn, dict):
        yield Finding("TurnInvalid", f"expected an object with from and value, found {_kind(turn)}", place)
        return
    if turn.get("from") not in ROLES:
        found = f"{turn['from']!r}" if "from" in turn else "nothing"
        yield Finding("UnknownRole", f"found {found}; expected human, gpt or system", f"{place}.from")
    if not isinstance(turn.get("value"), str):
        found = _kind(turn["value"]) if "value" in turn else "nothing"
        yield Finding("ValueNotText", f"expected text, found {found}", f"{place}.value")
    else:
        yield from _check_characters(turn["value"], f"{place}.value")


def _check_order(turns: Turns) -> Iterator[Finding]:
    roles = [turn["from"] for turn in turns]
    start = 1 if roles[0] == "system" else 0
    if "system" in roles[start:]:
        position = roles.index("system", start)
        yield Finding("SystemTurnMisplaced", "a system turn may only come first", f"conversations[{position}].from")
        return
    if roles[start : start + 1] == ["gpt"]:
        yield Finding(
            "AnswerWithoutQuestion",
            "no question comes before this answer; the turn is skipped, as upstream skips it",
            f"conversations[{start}].from",
            "warning",
        )
        start += 1
    for position in range(start + 1, len(roles)):
        if roles[position] == roles[position - 1]:
            yield Finding(
                "RolesNotAlternating",
                f"a second {roles[position]} turn in a row; human and gpt must alternate",
                f"conversations[{position}].from",
            )
            return
    if "gpt" not in roles[start:]:
        yield Finding("NothingSupervised", "there is no gpt turn to learn from", "conversations")
    elif roles[-1] == "human":
        yield Finding(
            "QuestionWithoutAnswer", "the last question has no answer", f"conversations[{len(roles) - 1}]", "warning"
        )


def _check_media(row: Row) -> Iterator[Finding]:
    image, video = row.get("image"), row.get("video")
    if image is not None and not isinstance(image, str):
        if not isinstance(image, list):
            yield Finding("ImageInvalid", f"expected a path or a list of paths, found {_kind(image)}", "image")
            return
        for position, path in enumerate(image):
            if not isinstance(path, str) or not path:
                yield Finding("ImageInvalid", f"expected a path, found {_kind(path)}", f"image[{position}]")
                return
    if video is not None and not isinstance(video, str):
        yield Finding("VideoInvalid", f"expected a path, found {_kind(video)}", "video")
        return
    if image and video:
        yield Finding("ImageAndVideo", "a row has images or a video, not both", "video")
    yield from _check_clip(row)
    for path, name in [*zip(images_of(row), image_fields(row), strict=True), (video, "video")]:
        if path:
            yield from _check_path(path, name)


def _check_clip(row: Row) -> Iterator[Finding]:
    clip = row.get("clip")
    if clip is None:
        return
    numbers = isinstance(clip, list) and len(clip) == 2 and all(type(value) in (int, float) for value in clip)
    if not numbers or not 0 <= clip[0] < clip[1]:
        yield Finding("ClipInvalid", f"expected [start, end] in seconds, found {json.dumps(clip)}", "clip")


def _check_characters(text: str, name: str) -> Iterator[Finding]:
    """JSON can write half of a surrogate pair, which neither a tokenizer nor a file system takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        yield Finding("InvalidText", f"found {half}, half of a surrogate pair; write the whole character", name)


def _check_path(path: str, name: str) -> Iterator[Finding]:
    yield from _check_characters(path, name)
    try:
        media_path(path)
    except ValueError as error:
        yield Finding("PathLeavesRoot", str(error), name)


def _check_marks(row: Row) -> Iterator[Finding]:
    """As many marks as images, counted as they are placed."""
    turns, images, video = row["conversations"], images_of(row), video_of(row)
    if video:
        marks = sum(turn["value"].count(VIDEO_MARK) for turn in turns)
        if marks > 1:
            yield Finding("VideoMarkMismatch", f"{marks} {VIDEO_MARK} marks for 1 video", "conversations")
    marks = sum(turn["value"].count(IMAGE_MARK) for turn in place_marks(row))
    if marks != len(images):
        yield Finding(
            "ImageMarkMismatch",
            f"{marks} {IMAGE_MARK} marks for {len(images)} {'image' if len(images) == 1 else 'images'}; "
            f"expected one for each image",
            "conversations",
        )

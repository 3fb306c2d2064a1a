"""The schema of an annotation's rows: a line of JSONL becomes a checked ChatRow, or findings with file and line.

Only the text of the row is checked here. `row_checks` also decodes its media and counts its tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

from ..json_text import InvalidJson, parse_json
from .diagnostics import Finding, errors_of
from .media_names import is_base64_picture, is_inline, is_picture_name, is_video_name
from .row_fields import check_foreign_marks, check_row_fields, check_turn_fields, hint_turn_field

LONGEST_ROW = 16 << 20
"""Bytes of a line; a longer one is a finding and is not parsed."""

_LONGEST_CLIP = 1e7  # seconds, four months; a larger number overflows when it becomes a frame
IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"

Role = Literal["human", "gpt", "system"]


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    text: str


@dataclass(frozen=True)
class MediaFile:
    """A file that a row names.

    Attributes:
        path: below the dataset's root.
        field: the row's field, for messages: image, image[2], video, or video[2] for a frame.
    """

    path: str
    field: str

    @property
    def kind(self) -> str:
        """Image or Video, as the reasons of findings begin."""
        return "Video" if self.field.startswith("video") else "Image"

    @property
    def is_picture(self) -> bool:
        """Whether it must be a picture: an image, or a frame of a list."""
        return self.field != "video"


@dataclass(frozen=True)
class RowMedia:
    """The images of a row, or its video; both are empty for a text-only row.

    Attributes:
        video: a video file, or a folder with its frames as pictures.
        clip: (start, end) of the video in seconds; None is the whole video.
        frames: the frames of the video in order, where the row lists them.
    """

    images: tuple[MediaFile, ...] = ()
    video: MediaFile | None = None
    clip: tuple[float, float] | None = None
    frames: tuple[MediaFile, ...] = ()

    @classmethod
    def from_fields(cls, row: Mapping[str, Any]) -> RowMedia:
        """The media of a row with valid fields; as upstream, an empty path or list means no media."""
        image, video, clip = row.get("image"), row.get("video"), row.get("clip")
        if isinstance(video, list) and len(video) == 1 and not is_picture_name(video[0]):
            video = video[0]
        is_list = isinstance(video, list)
        return cls(
            _media_files(image, "image"),
            MediaFile(video, "video") if video and not is_list else None,
            (clip[0], clip[1]) if clip else None,
            _media_files(video, "video") if is_list else (),
        )

    @property
    def has_video(self) -> bool:
        """Whether the row has a video."""
        return self.video is not None or bool(self.frames)

    @property
    def files(self) -> tuple[MediaFile, ...]:
        """Every file, in the row's order."""
        return (*self.images, *([self.video] if self.video else []), *self.frames)

    @property
    def has_image_list(self) -> bool:
        """Whether the row gives its images as a list."""
        return any(image.field != "image" for image in self.images)

    def image_value(self) -> str | list[str] | None:
        """The value of the row's field `image`."""
        paths = [image.path for image in self.images]
        return paths if self.has_image_list else paths[0] if paths else None

    def video_value(self) -> str | list[str] | None:
        """The value of the row's field `video`."""
        return self.video.path if self.video else [frame.path for frame in self.frames] or None


def _media_files(value: str | Sequence[str] | None, field: str) -> tuple[MediaFile, ...]:
    if not value:
        return ()
    if isinstance(value, str):
        return (MediaFile(value, field),)
    return tuple(MediaFile(path, f"{field}[{position}]") for position, path in enumerate(value))


@dataclass(frozen=True)
class ChatRow:
    """A conversation with its media, valid by construction: `parse_chat_row` makes it.

    Attributes:
        turns: human and gpt alternate, after a system turn or none; a gpt turn may come first.
        file, line: where the row stands; line is None where `file` names an entry of a document that is not JSONL.
    """

    turns: tuple[Turn, ...]
    media: RowMedia
    file: str
    line: int | None


def parse_chat_row(text: bytes, file: str, line: int | None) -> tuple[ChatRow | None, list[Finding]]:
    """The row, or None when it has an error, and its findings with their place."""
    row, findings = _parse_object(text)
    chat = None
    if row is not None:
        findings = [*_check_turns(row), *check_row_fields(row), *_check_media(row)]
        if not errors_of(findings):
            chat = ChatRow(_turns_of(row), RowMedia.from_fields(row), file, line)
            marks = [*_check_marks(chat.turns, chat.media), *_check_answer_marks(row["conversations"], chat.media)]
            findings += marks
            chat = None if errors_of(marks) else chat
    return chat, [finding.at(file, line) for finding in findings]


def media_path(relative: str) -> str:
    """A row's path, normalised.

    Raises:
        ValueError: the path is absolute, is a URL or leaves the dataset's root.
    """
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or "://" in relative or "\0" in relative or not path.parts:
        raise ValueError(f"{relative!r} leaves the dataset's root; expected a path below it")
    return str(path)


def place_marks(turns: Sequence[Turn], media: RowMedia, frames: int = 0) -> list[Turn]:
    """The turns with one `<image>` mark for each image or video frame, outside of answers.

    As upstream, the only image of a row, or its video, gets a mark before the first question when no question has one,
    and a video's mark becomes one line for each frame. Marks in answers stay text.
    """
    marked = list(turns)
    mark = IMAGE_MARK if media.images else VIDEO_MARK
    has_video = media.has_video and not media.images
    if (len(media.images) == 1 or has_video) and not _count_marks(marked, mark):
        first = next((index for index, turn in enumerate(marked) if turn.role == "human"), 0)
        marked[first] = replace(marked[first], text=f"{mark}\n{marked[first].text}")
    if has_video:
        lines = "\n".join(f"Frame-{number}: {IMAGE_MARK}" for number in range(1, frames + 1))
        marked = [
            turn if turn.role == "gpt" else replace(turn, text=re.sub(rf"{VIDEO_MARK}\n?", f"{lines}\n", turn.text))
            for turn in marked
        ]
    return marked


def _count_marks(turns: Sequence[Turn], mark: str) -> int:
    """Marks that stand for media: those outside of answers."""
    return sum(turn.text.count(mark) for turn in turns if turn.role != "gpt")


def _parse_object(text: bytes) -> tuple[dict[str, Any] | None, list[Finding]]:
    if len(text) > LONGEST_ROW:
        return None, [
            Finding("RowTooLong", f"found more than {LONGEST_ROW >> 20} MiB in one line; is a newline missing?")
        ]
    try:
        row = parse_json(text)
    except InvalidJson as error:
        return None, [Finding("InvalidJson", error.message)]
    if not isinstance(row, dict):
        return None, [Finding("NotAnObject", f"expected a JSON object, found {_kind(row)}")]
    return row, []


def _turns_of(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    turns = tuple(Turn(turn["from"], turn["value"]) for turn in row["conversations"])
    system = row.get("system")
    return (Turn("system", system), *turns) if system and turns[0].role != "system" else turns


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _check_turns(row: Mapping[str, Any]) -> Iterator[Finding]:
    turns = row.get("conversations")
    if "conversations" not in row:
        yield Finding("ConversationsMissing", "expected a list of turns, found nothing", "conversations")
    elif not isinstance(turns, list):
        yield Finding("ConversationsMissing", f"expected a list of turns, found {_kind(turns)}", "conversations")
    elif not turns:
        yield Finding("ConversationsEmpty", "the list of turns is empty", "conversations")
    else:
        broken = [finding for position, turn in enumerate(turns) for finding in _check_turn(turn, position)]
        yield from broken
        if not errors_of(broken):
            yield from _check_order([turn["from"] for turn in turns])
            yield from _check_system(row.get("system"), turns[0])
            yield from _check_answers(turns)


def _check_turn(turn: Any, position: int) -> Iterator[Finding]:
    place = f"conversations[{position}]"
    if not isinstance(turn, dict):
        yield Finding("TurnInvalid", f"expected an object with from and value, found {_kind(turn)}", place)
        return
    if turn.get("from") not in get_args(Role):
        found = f"{turn['from']!r}" if "from" in turn else f"nothing{hint_turn_field(turn, 'from')}"
        yield Finding("UnknownRole", f"found {found}; expected human, gpt or system", f"{place}.from")
    if not isinstance(turn.get("value"), str):
        found = _kind(turn["value"]) if "value" in turn else f"nothing{hint_turn_field(turn, 'value')}"
        yield Finding("ValueNotText", f"expected text, found {found}", f"{place}.value")
    else:
        yield from check_characters(turn["value"], f"{place}.value")
    yield from check_turn_fields(turn, place)
    if turn.get("from") == "human" and isinstance(turn.get("value"), str):
        yield from check_foreign_marks(turn["value"], f"{place}.value")


def _check_system(system: Any, first: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings for the row's field `system`, which means the same as a system turn at the start."""
    if system is None:
        return
    if not isinstance(system, str):
        yield Finding("SystemNotText", f"expected text, found {_kind(system)}", "system")
        return
    yield from check_characters(system, "system")
    if system and first["from"] == "system" and first["value"] != system:
        message = "the row has another system turn in conversations; keep one of the two"
        yield Finding("SystemTwice", message, "system")


def _check_answers(turns: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    for position, turn in enumerate(turns):
        if turn["from"] == "gpt" and not turn["value"].strip():
            message = "the answer is empty; the row teaches to end the turn at once"
            yield Finding("AnswerEmpty", message, f"conversations[{position}].value", "warning")


def _check_order(roles: Sequence[Role]) -> Iterator[Finding]:
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


def _check_media(row: Mapping[str, Any]) -> Iterator[Finding]:
    image, video = row.get("image"), row.get("video")
    problem = _check_paths(image, "image") or _check_paths(video, "video")
    if problem is not None:
        yield problem
        return
    if isinstance(video, list) and len(video) > 1 and any(map(is_video_name, video)):
        message = f"found a list of {len(video)} paths; a row has one video, or a list of its frames as pictures"
        yield Finding("VideoInvalid", message, "video")
        return
    if image and video:
        yield Finding("ImageAndVideo", "a row has images or a video, not both", "video")
    yield from _check_clip(row.get("clip"))
    for media in RowMedia.from_fields({"image": image, "video": video}).files:
        yield from check_media_path(media)


def _check_paths(value: Any, field: str) -> Finding | None:
    """A finding for a field of media that is neither a path nor a list of paths."""
    reason = f"{field.capitalize()}Invalid"
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list):
        return Finding(reason, f"expected a path or a list of paths, found {_kind(value)}", field)
    for position, path in enumerate(value):
        if not isinstance(path, str) or not path:
            return Finding(reason, f"expected a path, found {_kind(path)}", f"{field}[{position}]")
    return None


def _check_clip(clip: Any) -> Iterator[Finding]:
    if clip is None:
        return
    numbers = isinstance(clip, list) and len(clip) == 2 and all(type(value) in (int, float) for value in clip)
    if not numbers or not 0 <= clip[0] < clip[1] <= _LONGEST_CLIP:
        yield Finding("ClipInvalid", f"expected [start, end] in seconds, found {json.dumps(clip)[:200]}", "clip")


def check_characters(text: str, field: str) -> Iterator[Finding]:
    """A finding of half a surrogate pair, which JSON can hold and neither a tokenizer nor a file system accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        yield Finding("InvalidText", f"found {half}, half of a surrogate pair; write the whole character", field)


def check_media_path(media: MediaFile) -> Iterator[Finding]:
    """Findings of a path that cannot be below a root; a picture in the text itself has none."""
    yield from check_characters(media.path, media.field)
    if is_inline(media.path) or (media.is_picture and is_base64_picture(media.path)):
        return
    try:
        media_path(media.path)
    except ValueError as error:
        yield Finding("PathLeavesRoot", str(error), media.field)


def _check_marks(turns: Sequence[Turn], media: RowMedia) -> Iterator[Finding]:
    """Every image or video has one mark, counted after the missing mark of a single one is placed."""
    placed = place_marks(turns, media, frames=0) if media.images else turns
    images, videos = len(media.images), int(media.has_video)
    marks = _count_marks(turns, VIDEO_MARK)
    if marks > videos:
        message = f"{marks} {VIDEO_MARK} marks for {_counted(videos, 'video')}; expected one for each video"
        yield Finding("VideoMarkMismatch", message, "conversations")
    marks = _count_marks(placed, IMAGE_MARK)
    if marks != images:
        message = f"{marks} {IMAGE_MARK} marks for {_counted(images, 'image')}; expected one for each image"
        yield Finding("ImageMarkMismatch", message, "conversations")


def _check_answer_marks(turns: Sequence[Mapping[str, Any]], media: RowMedia) -> Iterator[Finding]:
    """Findings for marks in answers, which place no media: a warning in a row with media, else an error."""
    for position, turn in enumerate(turns):
        mark = next(
            (mark for mark in (IMAGE_MARK, VIDEO_MARK) if turn["from"] == "gpt" and mark in turn["value"]), None
        )
        if mark is None:
            continue
        field = f"conversations[{position}].value"
        if media.files:
            message = f"found {mark} in an answer, where it stays text; media are marked in questions"
            yield Finding("MarkInAnswer", message, field, "warning")
        else:
            kind = mark.strip("<>")
            message = f"found {mark} in an answer of a row without {kind}; add the field {kind!r} or remove the mark"
            yield Finding("MarkInAnswer", message, field)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

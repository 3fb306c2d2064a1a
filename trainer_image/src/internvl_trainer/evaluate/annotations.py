"""An annotation file to questions with references: conversations, COCO's JSON, Karpathy's list, VQA and RefCOCO rows.

The formats are those of training and of upstream's evaluation scripts (OpenGVLab/InternVL, internvl_chat/eval).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_trainer.data.diagnostics import Finding, errors_of
from internvl_trainer.data.formats.vqa import VQA_QUESTION
from internvl_trainer.data.row_schema import (
    LONGEST_ROW,
    MediaFile,
    RowMedia,
    check_characters,
    check_media_path,
    parse_chat_row,
)
from internvl_trainer.errors import UserError
from internvl_trainer.json_text import InvalidJson, parse_json

# The question of upstream's scripts for a row of this format.
_REFCOCO_QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>"
_BOX_SCALE = 1000  # InternVL's boxes count in thousandths of the picture's width and height


class _Problem(ValueError):
    """A row that cannot be used; `finding` has the reason."""

    def __init__(self, reason: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.finding = Finding(reason, message, field)


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One thing to ask of some media, and what may be answered.

    Attributes:
        id: the row's own, else its image.
        media: the row's images, or its video, as in training.
        text: what is asked; None where the file only has pictures.
        plain: the bare question inside `text`, which a prompt's `{}` stands for.
        system: the row's own system message.
        place: file and line (or entry), for messages.
    """

    id: str | int
    media: RowMedia
    references: tuple[str, ...]
    place: str
    text: str | None = None
    plain: str | None = None
    system: str | None = None


def read_questions(path: Path, uri: str) -> list[Question]:
    """Every question of a file. Messages name `uri`.

    Raises:
        UserError: the file cannot be read, or an entry is wrong: the first is named with its line.
    """
    questions, findings = [], []
    for place, outcome in _entries(path, uri):
        if isinstance(outcome, Question):
            questions.append(outcome)
        else:
            findings += [(place, finding) for finding in outcome]
    if findings:
        place, first = findings[0]
        more = f" (and {len(findings) - 1} more findings)" if len(findings) > 1 else ""
        raise UserError(first.reason, f"{first}{more}", place)
    if not questions:
        raise UserError("AnnotationEmpty", "the annotation file has no rows", uri)
    return questions


def _entries(path: Path, uri: str) -> Iterator[tuple[str, Question | list[Finding]]]:
    text = path.read_bytes()
    if _is_lines(text, uri):
        for number, line in enumerate(text.split(b"\n"), 1):
            if line.strip():
                place = f"{uri}:{number}"
                yield place, _read_line(line, place)
        return
    document = parse_json(text, uri)
    if isinstance(document, list):
        for number, row in enumerate(document):
            place = f"{uri}: [{number}]"
            yield place, _read_line(json.dumps(row).encode(), place)
    elif isinstance(document, dict) and isinstance(document.get("images"), list):
        yield from _read_coco(document, uri)
    else:
        raise UserError(
            "AnnotationUnknown", "expected JSONL, a list of rows, or an object with images and annotations", uri
        )


def _is_lines(text: bytes, uri: str) -> bool:
    """One object a line, by the file's name or because its first line is an object that is no COCO document."""
    if uri.partition("?")[0].endswith(".jsonl"):
        return True
    try:
        first = parse_json(text.lstrip().split(b"\n", 1)[0])
    except InvalidJson:
        return False
    return isinstance(first, dict) and "annotations" not in first


def _read_line(line: bytes, place: str) -> Question | list[Finding]:
    """A row in any of the formats."""
    if len(line) > LONGEST_ROW:
        return _unplaced(parse_chat_row(line, place, None)[1])
    try:
        row = parse_json(line)
    except InvalidJson:
        return _unplaced(parse_chat_row(line, place, None)[1])
    try:
        if not isinstance(row, dict) or "conversations" in row:
            return _from_conversation(row, line, place)
        if "question" in row:
            return _from_vqa(row, place)
        if "sent" in row:
            return _from_refcoco(row, place)
        if "caption" in row:
            return _question(row, _checked_media(row), place, _texts(row["caption"], "caption"))
    except _Problem as error:
        return [error.finding]
    names = "conversations, question, sent (with bbox) or caption"
    return [Finding("RowUnknown", f"expected one of {names}, found {', '.join(sorted(row)) or 'nothing'}")]


def _from_conversation(row: Any, line: bytes, place: str) -> Question | list[Finding]:
    """The first question of a training row, and its answer."""
    parsed, findings = parse_chat_row(line, place, None)
    if parsed is None:
        return _unplaced(errors_of(findings))
    turns = parsed.turns
    system = turns[0].text if turns[0].role == "system" else None
    first = next((position for position, turn in enumerate(turns) if turn.role == "human"), None)
    if first is None:
        return _question(row, parsed.media, place, (_text(turns[-1].text, "conversations"),), system=system)
    answers = [turn.text for turn in turns[first + 1 : first + 2]]
    if not answers:
        return [Finding("ReferencesMissing", "the first question has no answer to compare with", "conversations")]
    asked, answer = turns[first].text, _text(answers[0], "conversations")
    return _question(row, parsed.media, place, (answer,), text=asked, plain=asked, system=system)


def _unplaced(findings: list[Finding]) -> list[Finding]:
    """Findings without their place, which the error that reports them names."""
    return [finding.at(None, None) for finding in findings]


def _from_vqa(row: Row, place: str) -> Question:
    """Upstream's VQA rows: image, question, question_id, and answer or answers."""
    question = _text(row["question"], "question")
    field = next((name for name in ("answers", "answer") if row.get(name)), None)
    if field is None:
        raise _Problem("ReferencesMissing", "expected an answer to compare with, found none", "answer")
    text = VQA_QUESTION.format(question)
    return _question(row, _checked_media(row), place, _texts(row[field], field), text=text, plain=question)


def _from_refcoco(row: Row, place: str) -> Question:
    """Upstream's RefCOCO rows: image, sent, bbox [x1, y1, x2, y2] in pixels of width x height."""
    try:
        width, height = float(row["width"]), float(row["height"])
        corners = [float(value) for value in row["bbox"]]
        left, top, right, bottom = (
            _finite(value * _BOX_SCALE / side) for value, side in zip(corners, (width, height) * 2, strict=True)
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise _Problem("BoxInvalid", "expected bbox [x1, y1, x2, y2], width and height, in pixels", "bbox") from error
    sentence = _text(row["sent"], "sent")
    reference = f"<box>[[{left:.6g}, {top:.6g}, {right:.6g}, {bottom:.6g}]]</box>"
    text = _REFCOCO_QUESTION.format(sentence)
    return _question(row, _checked_media(row), place, (reference,), text=text, plain=sentence)


def _read_coco(document: Row, uri: str) -> Iterator[tuple[str, Question | list[Finding]]]:
    """COCO's format, as COCO, NoCaps and Flickr30K have it: images, and captions that name one by its id."""
    captions: dict[Any, list[str]] = defaultdict(list)
    known = {image["id"] for image in document["images"] if _has_id(image)}
    annotations = document.get("annotations")
    for number, annotation in enumerate(annotations if isinstance(annotations, list) else []):
        place = f"{uri}: annotations[{number}]"
        try:
            image_id = annotation["image_id"]
            captions[image_id] += _texts(annotation["caption"], "caption")
        except (KeyError, TypeError):
            yield place, [Finding("AnnotationInvalid", "expected an object with image_id and caption")]
            continue
        except _Problem as error:
            yield place, [error.finding]
            continue
        if image_id not in known:
            yield place, [Finding("ReferenceUnmatched", f"found {image_id!r}, the id of no image", "image_id")]
    for number, image in enumerate(document["images"]):
        place = f"{uri}: images[{number}]"
        try:
            yield place, _from_image(image, captions, place)
        except _Problem as error:
            yield place, [error.finding]


def _from_image(image: Any, captions: dict[Any, list[str]], place: str) -> Question:
    if not _has_id(image):
        raise _Problem("AnnotationInvalid", "expected an object with id and file_name (or image)")
    if (name := image.get("file_name") or image.get("image")) is None:
        raise _Problem("ImageMissing", "expected file_name or image, found neither; is this the file of the pictures?")
    if not captions.get(image["id"]):
        raise _Problem("ReferencesMissing", f"no annotation has the image_id {image['id']!r}", "id")
    row = {"image": name, "id": image["id"]}
    return _question(row, _checked_media(row), place, tuple(captions[image["id"]]))


def _has_id(image: Any) -> bool:
    return isinstance(image, dict) and isinstance(image.get("id"), str | int)


def _question(row: Row, media: RowMedia, place: str, references: tuple[str, ...], **texts: str | None) -> Question:
    identity = next((row[name] for name in ("question_id", "image_id", "id") if row.get(name) is not None), None)
    if not isinstance(identity, str | int):
        identity = ", ".join(file.path for file in media.files) or place
    return Question(identity, media, references, place, **texts)


def _checked_media(row: Row) -> RowMedia:
    """The media of a row without turns, which has one image."""
    image = row.get("image") or None
    if not isinstance(image, str):
        raise _Problem("ImageInvalid", "expected a path", "image")
    file = MediaFile(image, "image")
    for finding in check_media_path(file):
        raise _Problem(finding.reason, finding.message, finding.field)
    return RowMedia((file,))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


def _texts(value: Any, field: str) -> tuple[str, ...]:
    """A text, a list of texts, or VQA's list of {answer}."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise _Problem("ReferencesMissing", "the list is empty", field)
    return tuple(_text(item.get("answer") if isinstance(item, dict) else item, field) for item in values)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = json.dumps(value) if isinstance(value, str) or value is None else f"a {type(value).__name__}"
        raise _Problem("ReferenceEmpty", f"expected text, found {found}", field)
    for finding in check_characters(value, field):
        raise _Problem(finding.reason, finding.message, field)
    return value

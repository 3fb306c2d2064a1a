"""Image-caption files of the retrieval guides become checked PairRows, and findings for unusable lines.

`flickr` (Flickr30K, Flickr30K-CN): the header `image,caption`, then a line `<file name>,<caption>` for each caption.
`coco` (COCO Karpathy): a JSON array of {"image", "caption", "image_id"}; a caption may be a list of captions.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_trainer.data.diagnostics import Finding
from internvl_trainer.data.formats.media_fields import MEDIA_NAMES
from internvl_trainer.data.index import refuse_pointer
from internvl_trainer.data.row_schema import LONGEST_ROW, MediaFile, check_characters
from internvl_trainer.errors import UserError
from internvl_trainer.retrieval.caption_text import normalise_caption

FORMATS = ("flickr", "coco")
_HEADER = "image,caption"
_LONGEST_ID = 18  # digits that fit 64 bits
_IMAGE_LINE = re.compile(r"(?P<image>.+?\.(?:jpe?g|png|webp|bmp|gif|tiff?))\s*,(?P<caption>.*)", re.IGNORECASE)
_COCO_EXAMPLE = '{"image": "val2014/….jpg", "caption": "…", "image_id": "coco_1"}'


@dataclass(frozen=True)
class PairRow:
    """One caption of one image, valid by construction: `read_captions` makes it.

    Attributes:
        image: path below the dataset's root.
        image_id: shared by all captions of the image and by no other image.
        caption: as it stands in the file.
        file, line: where the row stands; lines count from 1.
    """

    image: str
    image_id: int
    caption: str
    file: str
    line: int

    @property
    def media(self) -> MediaFile:
        """The image as a file of the row."""
        return MediaFile(self.image, "image")


@dataclass(frozen=True)
class CaptionFile:
    """The usable rows of a file, in its order, and the findings of the file."""

    rows: list[PairRow]
    findings: list[Finding]


def read_captions(path: str | Path, format: str, *, name: str | None = None) -> CaptionFile:
    """The rows and findings of a whole file.

    Args:
        format: one of FORMATS.
        name: the file's name in findings; None: its path.

    Raises:
        UserError: the format is unknown, or the file does not exist.
    """
    file = name or str(path)
    if format not in FORMATS:
        raise UserError("UnknownFormat", f"format is {format!r}; expected {' or '.join(FORMATS)}", file)
    try:
        refuse_pointer(Path(path), file)
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError("AnnotationMissing", "the annotation file is not there; check the path", file) from error
    parsed = list(_flickr_rows(data, file) if format == "flickr" else _coco_rows(data, file))
    rows = [each for each in parsed if isinstance(each, PairRow)]
    findings = [each for each in parsed if isinstance(each, Finding)]
    rows, repeated = _drop_repeated(rows)
    findings += repeated + _check_ids(rows) + _check_whole(rows, findings)
    findings.sort(key=lambda finding: finding.line or 0)
    return CaptionFile(rows, [finding.at(file, finding.line) for finding in findings])


Parsed = PairRow | Finding


def _flickr_rows(data: bytes, file: str) -> Iterator[Parsed]:
    ids: dict[str, int] = {}
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if len(raw) > LONGEST_ROW:
            message = f"found more than {LONGEST_ROW >> 20} MiB in one line; is a newline missing?"
            yield Finding("RowTooLong", message, line=number)
            continue
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            yield Finding("InvalidEncoding", f"not UTF-8 ({error.reason}); save the file as UTF-8", line=number)
            continue
        if number == 1:
            if line.replace(" ", "").lower() == _HEADER:
                continue
            yield _header_missing(line)
        if not line:
            continue
        found = _IMAGE_LINE.fullmatch(line)
        if found is None:
            message = f"expected <image file>,<caption>, found {line[:60]!r}"
            yield Finding("InvalidLine", message, line=number)
        else:
            image = found["image"].strip()
            yield _pair_row(image, ids.setdefault(image, len(ids)), found["caption"].strip(), file, number)


def _header_missing(line: str) -> Finding:
    message = f"expected the header {_HEADER!r}, found {line[:60]!r}; add it as the first line, or a caption is lost"
    return Finding("HeaderMissing", message, line=1)


def _pair_row(image: str, image_id: int, caption: Any, file: str, line: int) -> Parsed:
    if not isinstance(caption, str) or not normalise_caption(caption):
        message = f"{image} has no caption (found {caption!r}); add one or remove the row"
        return Finding("CaptionMissing", message, "caption", line=line)
    for halves in (*check_characters(image, "image"), *check_characters(caption, "caption")):
        return halves.at(None, line)
    return PairRow(image, image_id, caption, file, line)


def _coco_rows(data: bytes, file: str) -> Iterator[Parsed]:
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        yield Finding("InvalidEncoding", f"not UTF-8 ({error.reason}); save the file as UTF-8")
        return
    except json.JSONDecodeError as error:
        advice = f"expected one array of {_COCO_EXAMPLE}" if error.msg == "Extra data" else "is the file complete?"
        message = f"not valid JSON: {error.msg} (column {error.colno}); {advice}"
        yield Finding("InvalidJson", message, line=error.lineno)
        return
    except RecursionError:
        yield Finding("InvalidJson", f"nested too deeply; expected an array of {_COCO_EXAMPLE}")
        return
    except ValueError:  # Python reads no integer of more than 4300 digits
        yield Finding("InvalidJson", "it has a number of more than 4300 digits; shorten it")
        return
    if not isinstance(value, list):
        message = f"expected an array of {_COCO_EXAMPLE}, found {type(value).__name__}; is this the format flickr?"
        yield Finding("InvalidRow", message, line=1)
        return
    ids: dict[str, int] = {}
    for row, line in zip(value, _element_lines(text), strict=True):
        yield from _coco_captions(row, ids, file, line)


def _element_lines(text: str) -> Iterator[int]:
    """The line on which each element of a valid JSON array begins."""
    decoder, place, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        while text[place] in " \t\r\n,":
            place += 1
        if text[place] == "]":
            return
        line += text.count("\n", counted, place)
        counted = place
        yield line
        place = decoder.raw_decode(text, place)[1]


def _coco_captions(row: Any, ids: dict[str, int], file: str, line: int) -> Iterator[Parsed]:
    if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not row["image"]:
        yield Finding("InvalidRow", f"expected {_COCO_EXAMPLE}, found {str(row)[:60]}", "image", line=line)
        return
    if video := next((name for name in MEDIA_NAMES if name.lower().startswith("video") and row.get(name)), None):
        yield Finding(
            "FieldUnsupported", "retrieval models learn from pictures alone; remove the field", video, line=line
        )
        return
    image = row["image"]
    image_id = _number(row["image_id"]) if "image_id" in row else ids.setdefault(image, len(ids))
    if image_id is None:
        message = f"expected a number, or one after an underscore (coco_522418), found {row['image_id']!r}"
        yield Finding("InvalidImageId", message, "image_id", line=line)
        return
    texts = row.get("caption")
    for text in texts if isinstance(texts, list) and texts else [texts]:
        yield _pair_row(image, image_id, text, file, line)


def _number(value: Any) -> int | None:
    """The number after the last underscore, as upstream reads it."""
    found = re.fullmatch(r"(?:.*_)?(\d+)", str(value))
    return int(found[1]) if found and len(found[1]) <= _LONGEST_ID else None


def _drop_repeated(rows: list[PairRow]) -> tuple[list[PairRow], list[Finding]]:
    """Each (image, caption) once.

    A repeated caption could be drawn as its own negative, and recall would count it twice.
    """
    first: dict[tuple[str, str], PairRow] = {}
    findings = []
    for row in rows:
        before = first.setdefault((row.image, row.caption), row)
        if before is not row:
            message = f"{row.image} has this caption on line {before.line} already; it is left out here"
            findings.append(Finding("CaptionRepeated", message, "caption", "warning", line=row.line))
    return list(first.values()), findings


def _check_ids(rows: list[PairRow]) -> list[Finding]:
    """Each image has its own id: with a shared one, each image's captions would be right answers for the other."""
    owners: dict[int, str] = {}
    findings = []
    for row in rows:
        owner = owners.setdefault(row.image_id, row.image)
        if owner != row.image:
            message = f"{row.image_id} is the id of {owner} and of {row.image}; give each image its own"
            findings.append(Finding("ImageIdRepeated", message, "image_id", line=row.line))
    images: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        known = images[row.image]
        if known and row.image_id not in known:
            message = f"{row.image} has the ids {min(known)} and {row.image_id}; give it one"
            findings.append(Finding("ImageIdChanged", message, "image_id", line=row.line))
        known.add(row.image_id)
    return findings


def _check_whole(rows: list[PairRow], findings: list[Finding]) -> list[Finding]:
    if not rows and not findings:
        return [Finding("EmptySplit", "the file has no captions; is it the right split and language?")]
    if rows and len({row.image for row in rows}) == 1:
        message = f"all captions are of {rows[0].image}; matching needs captions of other images"
        return [Finding("OneImage", message)]
    return []

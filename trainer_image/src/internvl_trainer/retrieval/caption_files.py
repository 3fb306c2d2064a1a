"""Image-caption files of the retrieval guides, read line by line, with a finding for whatever cannot be used.

`flickr` (Flickr30K, Flickr30K-CN): the line `image,caption`, then `<file name>,<caption>` lines, a caption each.
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
from internvl_trainer.errors import UserError
from internvl_trainer.retrieval.caption_text import normalise_caption

FORMATS = ("flickr", "coco")
_HEADER = "image,caption"
_IMAGE_LINE = re.compile(r"(?P<image>.+?\.(?:jpe?g|png|webp|bmp|gif|tiff?))\s*,(?P<caption>.*)", re.IGNORECASE)
_COCO_EXAMPLE = '{"image": "val2014/….jpg", "caption": "…", "image_id": "coco_1"}'


@dataclass(frozen=True)
class Caption:
    """One caption of one image.

    Attributes:
        image: path below the dataset's root.
        image_id: a number that all captions of the image share, and no other image's has.
        text: as it stands in the file.
        line: counts from 1.
    """

    image: str
    image_id: int
    text: str
    line: int


@dataclass(frozen=True)
class CaptionFile:
    """The usable captions of a file, in its order, and what is wrong with the others or the whole."""

    captions: list[Caption]
    findings: list[Finding]


def read_captions(path: str | Path, format: str, *, name: str | None = None) -> CaptionFile:
    """Read a whole file.

    Args:
        format: one of FORMATS.
        name: what findings call the file; None: its path.

    Raises:
        UserError: an unknown format, or the file is not there.
    """
    if format not in FORMATS:
        raise UserError("UnknownFormat", f"format is {format!r}; expected {' or '.join(FORMATS)}", name or str(path))
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            "AnnotationMissing", "the annotation file is not there; check the path", name or str(path)
        ) from error
    rows = list(_flickr_rows(data) if format == "flickr" else _coco_rows(data))
    captions = [row for row in rows if isinstance(row, Caption)]
    findings = [row for row in rows if isinstance(row, Finding)]
    captions, repeated = _drop_repeated(captions)
    findings += repeated + _check_ids(captions) + _check_whole(captions, findings)
    findings.sort(key=lambda finding: finding.line or 0)
    return CaptionFile(captions, [finding.at(name or str(path), finding.line) for finding in findings])


Row = Caption | Finding


def _flickr_rows(data: bytes) -> Iterator[Row]:
    ids: dict[str, int] = {}
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
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
            yield _caption(image, ids.setdefault(image, len(ids)), found["caption"].strip(), number)


def _header_missing(line: str) -> Finding:
    message = f"expected the header {_HEADER!r}, found {line[:60]!r}; add it as the first line, or a caption is lost"
    return Finding("HeaderMissing", message, line=1)


def _caption(image: str, image_id: int, text: Any, line: int) -> Row:
    if not isinstance(text, str) or not normalise_caption(text):
        message = f"{image} has no caption (found {text!r}); add one or remove the row"
        return Finding("CaptionMissing", message, "caption", line=line)
    return Caption(image, image_id, text, line)


def _coco_rows(data: bytes) -> Iterator[Row]:
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        yield Finding("InvalidEncoding", f"not UTF-8 ({error.reason}); save the file as UTF-8")
        return
    except json.JSONDecodeError as error:
        message = f"not valid JSON: {error.msg} (column {error.colno}); is the file complete?"
        yield Finding("InvalidJson", message, line=error.lineno)
        return
    except RecursionError:
        yield Finding("InvalidJson", f"nested too deeply; expected an array of {_COCO_EXAMPLE}")
        return
    if not isinstance(value, list):
        message = f"expected an array of {_COCO_EXAMPLE}, found {type(value).__name__}; is this the format flickr?"
        yield Finding("InvalidRow", message, line=1)
        return
    ids: dict[str, int] = {}
    for row, line in zip(value, _element_lines(text), strict=True):
        yield from _coco_captions(row, line, ids)


def _element_lines(text: str) -> Iterator[int]:
    """The line on which each element of a JSON array (known to be valid) begins."""
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


def _coco_captions(row: Any, line: int, ids: dict[str, int]) -> Iterator[Row]:
    if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not row["image"]:
        yield Finding("InvalidRow", f"expected {_COCO_EXAMPLE}, found {str(row)[:60]}", "image", line=line)
        return
    image = row["image"]
    image_id = _number(row["image_id"]) if "image_id" in row else ids.setdefault(image, len(ids))
    if image_id is None:
        message = f"expected a number, or one after an underscore (coco_522418), found {row['image_id']!r}"
        yield Finding("InvalidImageId", message, "image_id", line=line)
        return
    texts = row.get("caption")
    for text in texts if isinstance(texts, list) and texts else [texts]:
        yield _caption(image, image_id, text, line)


def _number(value: Any) -> int | None:
    """Upstream reads what stands after the last underscore."""
    found = re.fullmatch(r"(?:.*_)?(\d+)", str(value))
    return int(found[1]) if found else None


def _drop_repeated(captions: list[Caption]) -> tuple[list[Caption], list[Finding]]:
    """Each (image, caption) once: another image's negative must not be its own caption, nor a figure count it twice."""
    first: dict[tuple[str, str], Caption] = {}
    findings = []
    for caption in captions:
        before = first.setdefault((caption.image, caption.text), caption)
        if before is not caption:
            message = f"{caption.image} has this caption on line {before.line} already; it is left out here"
            findings.append(Finding("CaptionRepeated", message, "caption", "warning", line=caption.line))
    return list(first.values()), findings


def _check_ids(captions: list[Caption]) -> list[Finding]:
    """Two images with one id would count as one photograph: each other's captions would be right answers."""
    owners: dict[int, str] = {}
    findings = []
    for caption in captions:
        owner = owners.setdefault(caption.image_id, caption.image)
        if owner != caption.image:
            message = f"{caption.image_id} is the id of {owner} and of {caption.image}; give each image its own"
            findings.append(Finding("ImageIdRepeated", message, "image_id", line=caption.line))
    images: dict[str, set[int]] = defaultdict(set)
    for caption in captions:
        known = images[caption.image]
        if known and caption.image_id not in known:
            message = f"{caption.image} has the ids {min(known)} and {caption.image_id}; give it one"
            findings.append(Finding("ImageIdChanged", message, "image_id", line=caption.line))
        known.add(caption.image_id)
    return findings


def _check_whole(captions: list[Caption], findings: list[Finding]) -> list[Finding]:
    if not captions and not findings:
        return [Finding("EmptySplit", "the file has no captions; is it the right split and language?")]
    if captions and len({caption.image for caption in captions}) == 1:
        message = f"all captions are of {captions[0].image}; matching needs captions of other images"
        return [Finding("OneImage", message)]
    return []

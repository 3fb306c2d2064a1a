"""Captions as conversations: one question for every picture, and the caption as its answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from internvl_api.spec.evaluation import TASK_DEFAULTS

from ..diagnostics import RowError
from .json_records import JsonArray
from .media_fields import media_of
from .source import ConvertedRows, Record, RowSource, not_utf8, parse_record
from .turns import finish_row

QUESTION = TASK_DEFAULTS["caption"].prompt
CAPTION_NAMES = ("caption", "text", "txt")
_FLICKR_LINE = re.compile(
    r"(?P<image>.+?\.(?:jpe?g|png|webp|bmp|gif|tiff?))(?:#\d+)?\s*[,\t](?P<caption>.*)", re.IGNORECASE
)
_HALVES = "surrogatepass"  # keeps half of a surrogate pair, which the checks report
_HEADERS = ("image,caption", "image_name,comment")


def from_caption(record: Record) -> Record:
    """The row of a record with a picture and a caption."""
    name = _caption_name(record)
    caption = record.get(name)
    if isinstance(caption, list) and len(caption) == 1:
        caption = caption[0]
    if not isinstance(caption, str):
        expected = "text"
        if isinstance(caption, list):
            expected = "one caption, as the file's first records have; list captions from the first record on"
            expected = expected if caption else "a caption, found an empty list"
        raise RowError.single("ValueNotText", f"expected {expected}", name)
    media = media_of(record)
    if not media["image"]:
        raise RowError.single("ImageMissing", "a caption needs a picture; found none", "image")
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": caption.strip()}]
    return finish_row({key: value for key, value in record.items() if key == "id"}, turns, media)


def _caption_name(record: Record) -> str:
    return next((name for name in CAPTION_NAMES if name in record), "caption")


@dataclass(frozen=True)
class CaptionLists(ConvertedRows):
    """One row for each caption of records that list several captions of a picture, in the order of the list.

    The rows of a record have its line. A record without a caption keeps one row, for the checks to report.

    Attributes:
        ends: (records,) int64 rows up to the end of each record.
    """

    ends: np.ndarray

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> bytes:
        """The row as JSON. Raises RowError for a record that cannot be converted."""
        number, place = self._find(row)
        text = self.records[number]
        record = parse_record(text)
        if record is not None and isinstance(captions := record.get(_caption_name(record)), list) and captions:
            record[_caption_name(record)] = captions[place]
        return text if record is None else json.dumps(from_caption(record), ensure_ascii=False).encode(errors=_HALVES)

    def line_number(self, row: int) -> int:
        """1-based line, or number of the record."""
        return self.records.line_number(self._find(row)[0])

    def _find(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = int(np.searchsorted(self.ends, row, side="right"))
        return number, row - (int(self.ends[number - 1]) if number else 0)


def caption_rows(records: RowSource, first: Iterable[Record]) -> ConvertedRows:
    """The rows of records with captions: CaptionLists if one of the `first` records has a list, else one row each."""
    if not any(isinstance(record.get(_caption_name(record)), list) for record in first):
        return ConvertedRows(records, from_caption)
    counts = [_count_captions(records, number) for number in range(len(records))]
    return CaptionLists(records, from_caption, np.cumsum(counts, dtype=np.int64))


def _count_captions(records: RowSource, number: int) -> int:
    try:
        record = parse_record(records[number]) or {}
    except RowError:
        return 1
    captions = record.get(_caption_name(record))
    return max(1, len(captions)) if isinstance(captions, list) else 1


@dataclass(frozen=True)
class FlickrLines:
    """Records of a Flickr caption file: `image,caption` lines, or `image#n<TAB>caption`."""

    lines: RowSource

    @property
    def path(self) -> Path:
        """The file on this machine."""
        return self.lines.path

    def __len__(self) -> int:
        return len(self.lines) - self._skipped

    def __getitem__(self, row: int) -> bytes:
        """Raises RowError for a line that is no caption."""
        try:
            text = self.lines[row + self._skipped].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise not_utf8(error, "caption") from error
        found = _FLICKR_LINE.fullmatch(text.strip())
        if found is None:
            raise RowError.single("InvalidLine", f"expected <image file>,<caption>, found {text[:60]!r}", "image")
        caption = found["caption"].strip()
        if caption.startswith('"') and caption.endswith('"') and len(caption) > 1:
            caption = caption[1:-1].replace('""', '"')
        return json.dumps({"image": found["image"], "caption": caption}).encode()

    def line_number(self, row: int) -> int:
        """1-based line."""
        return self.lines.line_number(row + self._skipped)

    @property
    def _skipped(self) -> int:
        return int(is_flickr_header(self.lines[0]))


def is_flickr_header(line: bytes) -> bool:
    """Whether a line is the header of a Flickr caption file."""
    text = line.decode("utf-8-sig", errors="replace").replace(" ", "").replace("|", ",").lower()
    return text in _HEADERS


def is_flickr_line(line: bytes) -> bool:
    """Whether a line is an image and its caption; the text of a JSON object may look like one."""
    if line.removeprefix(b"\xef\xbb\xbf").startswith(b"{"):
        return False
    return _FLICKR_LINE.fullmatch(line.decode("utf-8-sig", errors="replace").strip()) is not None


@dataclass(frozen=True)
class CocoCaptions:
    """Records of COCO's captions_*.json: `annotations` with the file name of their `images`."""

    annotations: JsonArray
    names: dict[int | str, str]

    @property
    def path(self) -> Path:
        """The file on this machine."""
        return self.annotations.path

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, row: int) -> bytes:
        """Raises RowError for an annotation of no image."""
        record = parse_record(self.annotations[row]) or {}
        number = record.get("image_id")
        name = self.names.get(number) if isinstance(number, int | str) else None
        if name is None:
            message = f"found {record.get('image_id')!r}, which no entry of `images` has"
            raise RowError.single("ImageMissing", message, "image_id")
        return json.dumps({"image": name, "caption": record.get("caption"), "id": record.get("id")}).encode()

    def line_number(self, row: int) -> int:
        """1-based line, or record."""
        return self.annotations.line_number(row)


def coco_captions(arrays: dict[str | None, JsonArray]) -> CocoCaptions:
    """The captions of COCO's document, from its arrays `images` and `annotations`."""
    images = (parse_record(arrays["images"][row]) or {} for row in range(len(arrays["images"])))
    names = {
        image["id"]: image["file_name"]
        for image in images
        if isinstance(image.get("id"), int | str) and "file_name" in image
    }
    return CocoCaptions(arrays["annotations"], names)

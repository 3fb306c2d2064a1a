"""The rows of an annotation in any format: its shards, the container they are in, and the kind of their records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from internvl_api.types import DataFormat

from internvl_trainer.artifacts.shards import list_shards
from internvl_trainer.artifacts.sources import fetch_file
from internvl_trainer.errors import UserError

from ..diagnostics import RowError
from ..index import RowIndex, refuse_pointer
from .captions import CaptionLists, FlickrLines, caption_rows, coco_captions, is_flickr_header, is_flickr_line
from .json_records import JsonArray, index_arrays
from .kinds import CONVERT, Kind, recognise
from .source import ARROW_MAGIC, PARQUET_MAGIC, ConvertedRows, Record, RowSource, parse_record
from .vqa import open_vqa

_LONGEST_ROW = 1 << 22  # bytes; a longer first line is a document
_LOOKED_AT = 100  # records of a file that decide its kind
_STREAM, _TAR = b"\xff\xff\xff\xff", b"ustar"
_TAR_MARK = slice(257, 262)
Source = TypeVar("Source", bound=RowSource)


@dataclass(frozen=True)
class Opened:
    """Rows, and in words what their file was taken for: "messages rows in a JSON array"."""

    rows: RowSource
    taken_for: str


def open_source(annotation: str, form: DataFormat, *, field: str, questions: str | None = None) -> Opened:
    """Fetch an annotation and find its rows.

    Args:
        annotation: a file, or shards: a pattern with `*`, or a repository hf://datasets/owner/name.
        form: the kind of its records, or auto.
        field: of the spec, for errors: spec.data.train.<name>.
        questions: VQAv2's questions file.

    Raises:
        UserError: the annotation is absent or unreadable, or is not in that format.
    """
    uris = list_shards(annotation, field=field)
    paths = [fetch_file(uri, field=f"{field}.annotation") for uri in uris]
    for uri, path in zip(uris, paths, strict=True):
        refuse_pointer(path, uri)
    try:
        return _open(paths, form, field, questions)
    except UserError as error:
        if error.where == str(paths[0]):  # name the user's URI, not the path in the cache
            raise UserError(error.reason, error.message, annotation) from error
        raise


def _open(paths: list[Path], form: DataFormat, field: str, questions: str | None) -> Opened:
    with paths[0].open("rb") as file:
        head = file.read(512)
    if head.startswith((PARQUET_MAGIC, ARROW_MAGIC, _STREAM)):
        from .arrow import ArrowRecords  # pyarrow takes a second to import

        container = "Parquet" if head.startswith(PARQUET_MAGIC) else "Arrow"
        return _convert(ArrowRecords(paths), form, container)
    if head[_TAR_MARK] == _TAR:
        from .webdataset import WebDatasetRecords

        return _convert(WebDatasetRecords(paths), form, "WebDataset shards")
    if len(paths) > 1:
        message = f"found {len(paths)} files; only Parquet, Arrow and tar files can be shards of one dataset"
        raise UserError("AnnotationUnreadable", message, f"{field}.annotation")
    return _open_text(paths[0], head, form, field, questions)


def _open_text(path: Path, head: bytes, form: DataFormat, field: str, questions: str | None) -> Opened:
    if _is_document(path, head):
        arrays = index_arrays(path)
        if None in arrays:
            return _convert(arrays[None], form, "a JSON array")
        return _open_document(arrays, path, form, field, questions)
    lines = RowIndex.build(path)
    if form in ("auto", "flickr") and (is_flickr_header(lines[0]) or is_flickr_line(lines[0])):
        return Opened(ConvertedRows(_filled(FlickrLines(lines)), CONVERT["flickr"]), "flickr captions")
    return _convert(lines, form, "JSON Lines")


def _is_document(path: Path, head: bytes) -> bool:
    """Whether a file is one JSON document, not one for each line."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"{"):
        return start.startswith(b"[")
    with path.open("rb") as file:
        first = file.readline(_LONGEST_ROW).strip()
    record = parse_record(first)
    return first == b"{" or len(first) == _LONGEST_ROW or (record is not None and "annotations" in record)


def _open_document(
    arrays: dict[str | None, JsonArray], path: Path, form: DataFormat, field: str, questions: str | None
) -> Opened:
    if "annotations" in arrays and "images" in arrays and form in ("auto", "coco"):
        return _captions(_filled(coco_captions(arrays)), "coco captions")
    if "annotations" in arrays and form in ("auto", "vqav2"):
        if questions is None:
            message = "VQAv2's questions are in a file of their own; name it in `questions`"
            raise UserError("QuestionsMissing", message, f"{field}.questions")
        place = f"{field}.questions"
        questions_file = fetch_file(questions, field=place)
        refuse_pointer(questions_file, questions)
        answers = open_vqa(_filled(arrays["annotations"]), questions_file, place)
        return Opened(ConvertedRows(answers, CONVERT["vqav2"]), "vqav2 questions and answers")
    names = ", ".join(str(name) for name in arrays) or "none"
    message = f"expected a JSON array of rows, or COCO's or VQAv2's document; found an object with the arrays: {names}"
    raise UserError("FormatUnknown", message, str(path))


def _convert(records: RowSource, form: DataFormat, container: str) -> Opened:
    _filled(records)
    kind: Kind = recognise(_first_records(records)) if form == "auto" else form
    taken_for = f"{kind} rows in {container}"
    if kind == "chat" and isinstance(records, RowIndex):
        return Opened(records, taken_for)
    if kind in ("coco", "flickr"):
        return _captions(records, taken_for)
    return Opened(ConvertedRows(records, CONVERT[kind]), taken_for)


def _captions(records: RowSource, taken_for: str) -> Opened:
    rows = caption_rows(records, _first_records(records))
    lists = ", one row for each caption" if isinstance(rows, CaptionLists) else ""
    return Opened(rows, taken_for + lists)


def _first_records(records: RowSource) -> Iterator[Record]:
    for row in islice(range(len(records)), _LOOKED_AT):
        try:
            record = parse_record(records[row])
        except RowError:
            continue
        if record is not None:
            yield record


def _filled(records: Source) -> Source:
    if len(records) == 0:
        raise UserError("AnnotationEmpty", "the annotation file has no rows", str(records.path))
    return records

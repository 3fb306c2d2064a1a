"""What a reader of rows offers, and records converted to upstream's rows on reading."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ...json_text import InvalidJson, parse_json
from ..diagnostics import Finding, RowError
from ..media import OpenMedia
from ..media_names import STORED
from ..row_schema import ChatRow, parse_chat_row

Record = dict[str, Any]
Convert = Callable[[Record], Record]
"""A record to upstream's row. Raises RowError, with findings that name the record's own fields."""

PARQUET_MAGIC, ARROW_MAGIC = b"PAR1", b"ARROW1"
"""How Parquet and Arrow files begin."""


def not_utf8(error: UnicodeDecodeError, field: str) -> RowError:
    """The finding of a text that is in another encoding."""
    message = f"not valid UTF-8 (byte {error.start}); convert the text: iconv -t UTF-8"
    return RowError.single("InvalidEncoding", message, field)


class RowSource(Protocol):
    """Random access to upstream's rows as JSON; `RowIndex` is the one for upstream's own files."""

    @property
    def path(self) -> Path: ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> bytes: ...

    def line_number(self, row: int) -> int: ...


@runtime_checkable
class Records(RowSource, Protocol):
    """Records that hold pictures or videos, and name them by paths that begin with STORED."""

    def stored_media(self, path: str) -> bytes:
        """The bytes of a picture or video. Raises FileNotFoundError when the records do not hold it."""
        ...


@dataclass(frozen=True)
class ConvertedRows:
    """Upstream's rows of records of another kind.

    Attributes:
        convert: None leaves records as they are.
    """

    records: RowSource
    convert: Convert | None

    @property
    def path(self) -> Path:
        """The (first) file on this machine."""
        return self.records.path

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> bytes:
        """The row as JSON; a record that is no JSON object stays as it is, for the checks to report.

        Raises:
            RowError: the record cannot be converted.
        """
        text = self.records[row]
        if self.convert is None:
            return text
        record = parse_record(text)
        return (
            text
            if record is None
            else json.dumps(self.convert(record), ensure_ascii=False).encode(errors="surrogatepass")
        )

    def line_number(self, row: int) -> int:
        """1-based line, or number of the record where records have no lines of their own."""
        return self.records.line_number(row)


def find_part(ends: Sequence[int], row: int) -> tuple[int, int]:
    """Number of the part that holds a row, and the row's place in it; `ends`: rows up to the end of each part.

    Raises:
        IndexError: no part has such a row.
    """
    if not 0 <= row < ends[-1]:
        raise IndexError(f"row {row} of {ends[-1]}")
    part = bisect_right(ends, row)
    return part, row - (ends[part - 1] if part else 0)


def shards_of(source: RowSource) -> list[Path]:
    """Every file that a source's rows come from."""
    records = source.records if isinstance(source, ConvertedRows) else source
    return list(getattr(records, "shards", [source.path]))


def parse_record(text: bytes) -> Record | None:
    """The JSON object of a record; None when it is none."""
    try:
        record = parse_json(text)
    except InvalidJson:
        return None
    return record if isinstance(record, dict) else None


def read_row(source: RowSource, row: int, file: str) -> tuple[ChatRow | None, list[Finding]]:
    """Row number `row` as `parse_chat_row` gives it: None when it has an error, and its findings with their place."""
    line = source.line_number(row)
    try:
        text = source[row]
    except RowError as error:
        return None, [finding.at(file, line) for finding in error.findings]
    return parse_chat_row(text, file, line)


@dataclass(frozen=True)
class WithStoredMedia:
    """An OpenMedia that reads stored media from the annotation, and all other files from the dataset's root."""

    records: Records
    elsewhere: OpenMedia

    def __call__(self, root: str, relative: str) -> bytes:
        """The file's bytes."""
        if relative.startswith(STORED):
            return self.records.stored_media(relative)
        return self.elsewhere(root, relative)


def media_opener(source: RowSource, elsewhere: OpenMedia) -> OpenMedia:
    """The OpenMedia of a source's rows; `elsewhere` opens media that the annotation does not store."""
    records = source.records if isinstance(source, ConvertedRows) else source
    return WithStoredMedia(records, elsewhere) if isinstance(records, Records) else elsewhere

"""Parquet and Arrow files of Hugging Face datasets: random access to rows, with media columns read on demand.

Parquet has no random access to rows, so it is copied once into an Arrow file in the node's cache, as the datasets
library does; Arrow files are mapped into memory and only the pages of the rows that are read are loaded.
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from internvl_trainer.artifacts.sources import derived_file
from internvl_trainer.errors import UserError

from ..media_names import STORED
from .media_fields import MEDIA_NAMES, refuse_unread_media
from .source import ARROW_MAGIC, PARQUET_MAGIC, find_part

_BATCH_ROWS, _BATCH_BYTES = 256, 32 << 20  # of a record batch in the cache; bounds the memory of the copy
_OPEN_SHARDS = 64


class ArrowRecords:
    """Records of one or several files, as one sequence; `line_number` counts records from 1.

    A column of pictures (bytes, or {bytes, path}) becomes a path that `stored_media` reads.
    """

    def __init__(self, shards: list[Path]) -> None:
        self.path, self.shards = shards[0], shards
        self._files = [_as_arrow(shard) for shard in shards]
        self._ends = list(accumulate(len(_open(path)) for path in self._files))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> bytes:
        """The record as JSON. Raises RowError for bytes in a column that is not read."""
        table, place = self._find(row)
        batch, offset = table.locate(place)
        record = {
            name: _value(batch.column(position)[offset], name, f"{STORED}{row + 1}/{name}")
            for position, name in enumerate(batch.schema.names)
        }
        refuse_unread_media(record)
        return json.dumps(record, ensure_ascii=False, default=_as_text).encode(errors="surrogatepass")

    def line_number(self, row: int) -> int:
        """1-based number of the record, over all files."""
        return row + 1

    def stored_media(self, path: str) -> bytes:
        """The bytes of a column of a record. Raises FileNotFoundError where there is none."""
        number, name, *position = path.removeprefix(STORED).split("/")
        try:
            table, place = self._find(int(number) - 1)
            batch, offset = table.locate(place)
            value = _decoded(batch.column(name)[offset])
            value = value.values[int(position[0])] if position else value
            value = value["bytes"] if pa.types.is_struct(value.type) else value
        except (KeyError, ValueError, IndexError) as error:
            raise FileNotFoundError(path) from error
        return bytes(value.as_buffer())

    def _find(self, row: int) -> tuple[_Table, int]:
        shard, place = find_part(self._ends, row)
        return _open(self._files[shard]), place


class _Table:
    """The record batches of an Arrow file that is mapped into memory."""

    def __init__(self, path: Path) -> None:
        source = pa.memory_map(str(path))
        options = pa.ipc.IpcReadOptions(use_threads=False)
        self._reader = None
        if bytes(source.read(len(ARROW_MAGIC))) == ARROW_MAGIC:
            self._reader = pa.ipc.open_file(source, options=options)
            counts = [self._reader.get_batch(number).num_rows for number in range(self._reader.num_record_batches)]
        else:
            source.seek(0)
            self._batches = list(pa.ipc.open_stream(source, options=options))
            counts = [batch.num_rows for batch in self._batches]
        self._ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, row: int) -> tuple[pa.RecordBatch, int]:
        """The batch of a row, and the row's place in it."""
        number, place = find_part(self._ends, row)
        return (self._reader.get_batch(number) if self._reader else self._batches[number]), place


@lru_cache(maxsize=_OPEN_SHARDS)
def _open(path: Path) -> _Table:
    try:
        return _Table(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(error, "Arrow", path) from error


def _as_arrow(path: Path) -> Path:
    """The file itself, or for Parquet its copy in the cache."""
    with path.open("rb") as file:
        if file.read(len(PARQUET_MAGIC)) != PARQUET_MAGIC:
            return path
    return derived_file(path, "arrow of parquet", lambda target: _copy_parquet(path, target))


def _copy_parquet(path: Path, target: Path) -> None:
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as source:
            rows = _rows_of_batch(source)
            with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, source.schema_arrow) as writer:
                for batch in source.iter_batches(batch_size=rows, use_threads=False):
                    writer.write_batch(batch)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(error, "Parquet", path) from error


def _unreadable(error: Exception, kind: str, path: Path) -> Exception:
    """The error of a damaged file; one of the machine, such as a full disk, stays as it is."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return UserError("AnnotationUnreadable", f"not a whole {kind} file: {error}", str(path))


def _rows_of_batch(source: pq.ParquetFile) -> int:
    meta = source.metadata
    size: int = sum(meta.row_group(group).total_byte_size for group in range(meta.num_row_groups))
    rows: int = meta.num_rows
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * max(1, rows) // max(1, size)))


def _value(value: pa.Scalar, name: str, path: str) -> Any:
    """A column's value as JSON has it; bytes that are text under a name that is none of media are that text."""
    value = _decoded(value)
    if name not in MEDIA_NAMES and value.is_valid and _is_binary(value.type):
        return _as_text(value.as_py()) or path
    return _plain(value, path)


def _as_text(value: Any) -> str | None:
    """The text of a value that JSON has no type for; None for bytes that are no text."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _decoded(value: pa.Scalar) -> pa.Scalar:
    """The value itself where its column holds each value once, with numbers in their places."""
    return value.value if pa.types.is_dictionary(value.type) and value.is_valid else value


def _is_binary(kind: pa.DataType) -> bool:
    of = pa.types
    return bool(
        of.is_binary(kind) or of.is_large_binary(kind) or of.is_fixed_size_binary(kind) or of.is_binary_view(kind)
    )


def _plain(value: pa.Scalar, path: str) -> Any:
    """A value as JSON has it; media as `path`, or as their own path when they hold no bytes."""
    if not value.is_valid:
        return None
    kind = value.type
    if _is_binary(kind):
        return path
    if pa.types.is_struct(kind) and "bytes" in [field.name for field in kind]:
        return path if value["bytes"].is_valid else value.as_py().get("path")
    if _holds_media(kind):
        return [_plain(each, f"{path}/{position}") for position, each in enumerate(value.values)]
    return value.as_py()


def _holds_media(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    inner = kind.value_type
    return _is_binary(inner) or (pa.types.is_struct(inner) and "bytes" in [field.name for field in inner])

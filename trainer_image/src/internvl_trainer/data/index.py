"""A JSONL file as an array of byte offsets; rows are read on demand and never held."""

from __future__ import annotations

import codecs
import mmap
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import UserError
from ..git_lfs import is_pointer
from .row_schema import LONGEST_ROW

_CHUNK = 1 << 24
_LONGEST_BLANK = 16  # bytes; a longer line of spaces counts as a row, which preflight reports as invalid JSON


class RowIndex:
    """Random access to the lines of a file, with 8 bytes a row in memory (80 MB for 10 million rows).

    Blank lines are not rows, but `line_number` counts them, as an editor does.
    """

    def __init__(self, path: str | Path, offsets: np.ndarray, line_numbers: np.ndarray | None) -> None:
        self.path = Path(path)
        self._offsets = offsets  # start of each row, then the end of the last
        self._line_numbers = line_numbers  # None when no line is blank
        self._map: mmap.mmap | None = None

    @classmethod
    def build(cls, path: str | Path) -> RowIndex:
        """The index of a file, from one scan.

        Raises:
            UserError: the file is absent, or has no rows.
        """
        path = Path(path)
        try:
            offsets = _scan_lines(path)
        except FileNotFoundError as error:
            raise UserError(
                "AnnotationMissing", "the annotation file is not there; check the path", str(path)
            ) from error
        _check_encoding(path, lines=len(offsets) - 1)
        blank = _blank_lines(path, offsets)
        if len(blank) == len(offsets) - 1:
            raise UserError("AnnotationEmpty", "the annotation file has no rows", str(path))
        if len(blank) == 0:
            return cls(path, offsets, None)
        rows = np.delete(np.arange(len(offsets) - 1), blank)
        return cls(path, np.append(offsets[rows], offsets[-1]), rows + 1)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> bytes:
        """The row's line, without its newline; of a line longer than LONGEST_ROW, one byte more than that."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        start = int(self._offsets[row])
        text = self._data()[start : min(int(self._offsets[row + 1]), start + LONGEST_ROW + 1)]
        return text.strip().split(b"\n", 1)[0].rstrip(b"\r")

    def line_number(self, row: int) -> int:
        """1-based line of the file that a row is on."""
        return row + 1 if self._line_numbers is None else int(self._line_numbers[row])

    def _data(self) -> mmap.mmap:
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def __getstate__(self) -> dict[str, object]:
        """Without the memory map, which cannot be pickled; each worker process opens its own."""
        return {**self.__dict__, "_map": None}


_BEGINNINGS = {
    codecs.BOM_UTF16_LE: ("AnnotationEncoding", "is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`"),
    codecs.BOM_UTF16_BE: ("AnnotationEncoding", "is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`"),
    b"PK\x03\x04": ("AnnotationCompressed", "is a zip archive; unpack it and name the file inside"),
    b"\x1f\x8b": ("AnnotationCompressed", "is compressed with gzip; unpack it with `gunzip`"),
}


def refuse_pointer(path: Path, uri: str) -> None:
    """Raises UserError naming `uri` for a git-lfs pointer, whatever file it stands for."""
    if is_pointer(path):
        message = "the annotation file is a git-lfs pointer; run `git lfs pull` where it comes from"
        raise UserError("AnnotationIsPointer", message, uri)


def _check_encoding(path: Path, lines: int) -> None:
    """Raises UserError, once for the file, where each of its lines would be called invalid JSON."""
    refuse_pointer(path, str(path))
    with path.open("rb") as file:
        start = file.read(1 << 16)
    for beginning, (reason, what) in _BEGINNINGS.items():
        if start.startswith(beginning):
            raise UserError(reason, f"the annotation file {what}", str(path))
    if lines == 1 and start.rstrip(b"\r").count(b"\r"):
        message = "the annotation file ends its lines with CR alone; convert it with `tr '\\r' '\\n'`"
        raise UserError("AnnotationEncoding", message, str(path))


def _scan_lines(path: Path) -> np.ndarray:
    """(lines + 1,) int64 start of every line, then the end of the file."""
    breaks, position = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + position + 1)
            position += len(chunk)
    offsets = np.concatenate(breaks)
    has_last_newline = offsets[-1] == position
    return offsets if has_last_newline else np.append(offsets, position)


def _blank_lines(path: Path, offsets: np.ndarray) -> np.ndarray:
    """Positions of blank lines; only short lines are read."""
    short = np.flatnonzero(np.diff(offsets) <= _LONGEST_BLANK)
    with path.open("rb") as file:
        blank = [line for line in short.tolist() if not _line(file, offsets, line).strip()]
    return np.array(blank, np.int64)


def _line(file: BinaryIO, offsets: np.ndarray, line: int) -> bytes:
    file.seek(int(offsets[line]))
    return file.read(int(offsets[line + 1] - offsets[line]))

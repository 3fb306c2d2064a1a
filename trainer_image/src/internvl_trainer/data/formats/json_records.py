"""The elements of a document's arrays by their place in the file: a JSON array as random access to its records."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np

from internvl_trainer.errors import UserError

_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)
_OPEN, _CLOSE = b"[{", b"]}"


class JsonArray:
    """Random access to the objects of an array, with 24 bytes a record in memory; the file is never held.

    `line_number` gives the line that a record starts on, or the record's number where several share a line.
    """

    def __init__(self, path: Path, spans: np.ndarray, lines: np.ndarray | None) -> None:
        self.path = path
        self._spans, self._lines = spans, lines  # (n, 2) int64 start and end; (n,) int64
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, row: int) -> bytes:
        """The record's text."""
        start, end = self._spans[row].tolist()
        if self._map is None:
            self._map = map_file(self.path)
        return self._map[start:end]

    def line_number(self, row: int) -> int:
        """1-based line, or number of the record."""
        return row + 1 if self._lines is None else int(self._lines[row])

    def __getstate__(self) -> dict[str, object]:
        """Without the memory map, which cannot be pickled."""
        return {**self.__dict__, "_map": None}


def map_file(path: Path) -> mmap.mmap:
    """The file, mapped into memory."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def index_arrays(path: Path) -> dict[str | None, JsonArray]:
    """The arrays of a document by their key; the key of a document that is an array itself is None.

    Elements that are numbers or texts are no records.

    Raises:
        UserError: the document ends early, or another one follows it.
    """
    text = map_file(path)
    spans: dict[str | None, list[int]] = {}
    key: bytes | None = None  # the last name at the depth of the document's own fields
    depth, base, own = 0, 0, 0  # `own`: depth of the records of the array `current`
    current: str | None = ""
    for token in _TOKEN.finditer(text):
        mark = token[0]
        if mark in _OPEN:
            if depth == 0 and (base or spans):
                line = text[: token.start()].count(b"\n") + 1
                message = "a second JSON document begins here; keep one array in a file, or write one row on each line"
                raise UserError("InvalidJson", message, f"{path}:{line}")
            if depth == base and mark == b"[" and (depth == 0 or key is not None):
                current, own = _name(key), depth + 1
                spans[current] = []
            elif depth == 0:
                base = 1
            elif current in spans and depth == own:
                spans[current].append(token.start())
            depth += 1
        elif mark in _CLOSE:
            depth -= 1
            if current in spans and depth == own:
                spans[current].append(token.end())
            elif depth == base:
                current, key = "", None
        elif depth == base == 1:
            key = mark
    if depth != 0:
        raise UserError("InvalidJson", "the JSON document ends early; is the file complete?", str(path))
    return {name: _array(path, text, found) for name, found in spans.items()}


def _name(key: bytes | None) -> str | None:
    return None if key is None else key[1:-1].decode(errors="replace")


def _array(path: Path, text: mmap.mmap, found: list[int]) -> JsonArray:
    spans = np.array(found, np.int64).reshape(-1, 2)
    lines, line, counted = np.empty(len(spans), np.int64), 1, 0
    for row, start in enumerate(spans[:, 0].tolist()):
        line += text[counted:start].count(b"\n")
        lines[row], counted = line, start
    own = bool((np.diff(lines) > 0).all())
    return JsonArray(path, spans, lines if own else None)

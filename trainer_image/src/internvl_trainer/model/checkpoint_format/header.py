"""Check a remote safetensors file by its header and its length, without downloading it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...git_lfs import POINTER
from ...json_text import parse_json
from .files import CheckpointError, TensorEntry, refuse_pointer, weight_dtype

_LENGTH_BYTES = 8  # little-endian, before the header
_FIRST_READ = 128 << 10  # holds the header of nearly every file
_LONGEST_HEADER = 100 << 20  # what the safetensors library reads

ReadStart = Callable[[int], bytes]
"""Gives the first so many bytes of a file."""


def check_header(name: str, size: int, read: ReadStart, place: str) -> list[tuple[TensorEntry, int]]:
    """The tensors of a file of `size` bytes, and where the data of each begin in it; reads only its header.

    Raises:
        CheckpointError: a git-lfs pointer, no safetensors, or a length that does not fit the header.
    """
    start = read(min(size, _FIRST_READ))
    refuse_pointer(start[: len(POINTER)], place)
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    end = _LENGTH_BYTES + length
    if length > _LONGEST_HEADER or end > size:
        raise _damaged(f"its header would have {length} bytes", size, place)
    if len(start) < end:
        start = read(end)
    try:
        header = parse_json(start[_LENGTH_BYTES:end], place)
    except UserError as error:
        raise _damaged("its header is no JSON", size, place) from error
    entries, data = _read_entries(header, name, size, place)
    if end + data != size:
        raise _damaged(f"its header describes {end + data} bytes", size, place)
    return [(entry, end + first) for entry, first in entries]


def _read_entries(header: Any, name: str, size: int, place: str) -> tuple[list[tuple[TensorEntry, int]], int]:
    """The tensors with the places of their data behind the header, and the bytes that all data takes."""
    if not isinstance(header, dict):
        raise _damaged("its header is no object", size, place)
    entries: list[tuple[TensorEntry, int]] = []
    spans: list[tuple[int, int]] = []
    for tensor, described in header.items():
        if tensor == "__metadata__":
            continue
        try:
            entry, span = _read_entry(tensor, described, name, place)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(f"its header does not describe tensor {tensor}", size, place) from error
        entries.append((entry, span[0]))
        spans.append(span)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise _damaged("its tensors overlap or leave gaps", size, place)
        end = last
    return entries, end


def _read_entry(tensor: str, described: dict[str, Any], name: str, place: str) -> tuple[TensorEntry, tuple[int, int]]:
    """One tensor, and where its data begins and ends.

    Raises KeyError, TypeError or ValueError for a description that contradicts itself, CheckpointError for its dtype.
    """
    dtype = weight_dtype(tensor, described["dtype"], place)
    first, last = described["data_offsets"]
    shape = tuple(described["shape"])
    numbers = (first, last, *shape)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(tensor)
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(tensor)
    return TensorEntry(tensor, Path(name), shape, dtype), (first, last)


def _damaged(what: str, size: int, place: str) -> CheckpointError:
    return CheckpointError(
        "InvalidSafetensors",
        f"cannot be read as safetensors: {what}, and the file has {size}; it is cut short or damaged, copy it again",
        place,
    )

"""Weights that stay at their source: headers are read, and of the tensors only the rows that are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ...artifacts.ranges import RangeSource, RemoteFile
from ...artifacts.storage import StoredFile
from .files import INDEX_FILE, SINGLE_FILE, CheckpointError, TensorEntry, read_index
from .header import check_header

_PARALLEL_FILES = 8
T = TypeVar("T")


@dataclass(frozen=True)
class RemoteEntry(TensorEntry):
    """A tensor of a remote file.

    Attributes:
        origin: the version of the file that its header was read from.
        start: where the tensor's data begin in the file.
    """

    origin: RemoteFile
    start: int

    def open(self) -> RemoteTensor:
        """The tensor, of which nothing is read yet."""
        return RemoteTensor(self)


class RemoteTensor:
    """A tensor whose rows are read when they are indexed, by a slice or by their numbers."""

    def __init__(self, entry: RemoteEntry) -> None:
        self._entry = entry
        self.shape = torch.Size(entry.shape)
        self.ndim = len(entry.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            runs = [(start, max(start, stop))]
        else:
            runs = list(_runs(rows.tolist()))
        row = math.prod(self.shape[1:])
        return torch.cat([self._read(start * row, stop * row) for start, stop in runs]).reshape(-1, *self.shape[1:])

    def whole(self) -> torch.Tensor:
        """All of the tensor."""
        return self._read(0, self.shape.numel()).reshape(self.shape)

    def _read(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor."""
        entry = self._entry
        if start >= stop:
            return torch.empty(0, dtype=entry.dtype)
        size = entry.dtype.itemsize
        data = entry.origin.read(entry.start + start * size, entry.start + stop * size)
        return torch.frombuffer(data, dtype=entry.dtype)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the runs of consecutive numbers, in their order."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield numbers[start], numbers[place - 1] + 1
            start = place


def list_remote_tensors(source: RangeSource, directory: Path) -> list[TensorEntry]:
    """Every tensor of a remote checkpoint, from the headers of its files alone.

    Args:
        directory: has the checkpoint's other files, the index among them.

    Raises:
        RangesUnsupported: the files cannot be read in parts.
        CheckpointError: a file is missing, damaged, or not what the index says.
    """
    files = {file.key: file for file in source.list()}
    index = directory / INDEX_FILE
    by_file = read_index(index) if index.exists() else {SINGLE_FILE: None}
    if missing := sorted(by_file.keys() - files.keys()):
        message = f"{len(missing)} of {len(by_file)} weight files are missing, such as {missing[0]}; copy them again"
        raise CheckpointError("ShardMissing", message, source.uri)
    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        found = list(pool.map(lambda name: _read_header(source, files[name]), sorted(by_file)))
    entries: list[TensorEntry] = []
    for name, tensors in zip(sorted(by_file), found, strict=True):
        wanted = by_file[name]
        if wanted and (lost := wanted - {entry.name for entry in tensors}):
            message = f"{INDEX_FILE} says that tensor {min(lost)} is in this file, but it is not; copy both again"
            raise CheckpointError("TensorMissing", message, f"{source.uri}/{name}")
        entries += [entry for entry in tensors if wanted is None or entry.name in wanted]
    return entries


def versions_of(entries: Iterable[TensorEntry]) -> dict[str, str]:
    """The etag of each remote file."""
    files = (entry.origin.file for entry in entries if isinstance(entry, RemoteEntry))
    return {file.key: file.etag for file in files}


def _read_header(source: RangeSource, file: StoredFile) -> list[RemoteEntry]:
    origin = RemoteFile(source, file)
    found = check_header(file.key, file.size, lambda length: bytes(origin.read(0, length)), f"{source.uri}/{file.key}")
    return [RemoteEntry(entry.name, entry.file, entry.shape, entry.dtype, origin, start) for entry, start in found]


def in_order(reads: Iterable[Callable[[], T]], threads: int) -> Iterator[T]:
    """The results of the reads, in order. Up to `threads` reads run ahead; with 0, each starts when it is asked for."""
    if threads == 0:
        yield from (read() for read in reads)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting = []
        for read in reads:
            waiting.append(pool.submit(read))
            if len(waiting) > threads:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()

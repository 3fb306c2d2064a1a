"""Rewrites checkpoints under other names or with other values, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from .config import Architecture
from .files import DTYPE_NAMES, INDEX_FILE, SINGLE_FILE, TensorEntry, read_tensor
from .tensors import DERIVED, IncompleteTensor, Rule, join_fused, match_native, match_upstream, split_fused

if TYPE_CHECKING:
    from .remote import RemoteTensor

Change = Callable[[str, torch.Tensor], torch.Tensor]
"""(native name, tensor) to the tensor to store; also called on the meta device, for shape and dtype."""

Read = Callable[[TensorEntry], torch.Tensor]

Stored: TypeAlias = "torch.Tensor | RemoteTensor"
"""A tensor of a checkpoint of which rows can be taken."""

Extents = tuple[tuple[int, int], ...]
"""(start, end) of ranges of a tensor's rows or columns, in order."""


@dataclass(frozen=True)
class Part:
    """The rows (dim 0) or columns (dim 1) of a tensor that one process needs."""

    dim: int
    extents: Extents


class Described(Protocol):
    """A tensor's name, shape and dtype, without its data."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def nbytes(self) -> int: ...


def unchanged(_: str, tensor: torch.Tensor) -> torch.Tensor:
    """The Change that keeps every tensor."""
    return tensor


@dataclass(frozen=True)
class Piece:
    """A native tensor that is a stored tensor or a part of one.

    Attributes:
        name: the native name, or the stored one of a buffer that the native model lacks.
        rule, part: how the stored tensor is split, and the number of this part; rule is None when it is not split.
    """

    name: str
    entry: TensorEntry
    rule: Rule | None = None
    part: int = 0

    def make(self, read: Read, architecture: Architecture) -> torch.Tensor:
        """The native tensor, given a reader of stored ones."""
        stored = read(self.entry)
        return stored if self.rule is None else split_fused(stored, self.rule, architecture)[self.part]

    def rows(self, stored: Stored, architecture: Architecture, start: int, end: int | None) -> torch.Tensor:
        """Rows [start, end) of the native tensor. Of a mapped or remote file, only these rows are read."""
        if self.rule is None:
            return stored[start:end]
        if stored.ndim == 0:
            whole = stored if isinstance(stored, torch.Tensor) else stored.whole()
            return split_fused(whole, self.rule, architecture)[self.part][start:end]
        places = split_fused(torch.arange(len(stored)), self.rule, architecture)[self.part][start:end]
        first, last = (int(places[0]), int(places[-1])) if len(places) else (0, -1)
        return stored[first : last + 1] if last - first + 1 == len(places) else stored[places]

    def cut(self, stored: Stored, architecture: Architecture, part: Part | None) -> torch.Tensor:
        """A part of the native tensor; None is all of it."""
        if part is None or part.dim == 1:
            return cut(self.rows(stored, architecture, 0, None), part)
        return _joined([self.rows(stored, architecture, start, end) for start, end in part.extents])


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its pieces are changed, then joined."""

    name: str
    pieces: tuple[Piece, ...]
    architecture: Architecture
    change: Change
    rule: Rule | None = None

    def make(self, read: Read) -> torch.Tensor:
        """The tensor, given a reader of stored ones."""
        parts = tuple(self.change(piece.name, piece.make(read, self.architecture)) for piece in self.pieces)
        return parts[0] if self.rule is None else join_fused(parts, self.rule, self.architecture)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._on_meta.shape)

    @cached_property
    def dtype(self) -> torch.dtype:
        return self._on_meta.dtype

    @property
    def nbytes(self) -> int:
        return self._on_meta.nbytes

    @cached_property
    def _on_meta(self) -> torch.Tensor:
        return self.make(lambda entry: torch.empty(entry.shape, dtype=entry.dtype, device="meta"))


def cut(tensor: torch.Tensor, part: Part | None) -> torch.Tensor:
    """A part of a tensor; None is all of it."""
    if part is None:
        return tensor
    return _joined([tensor.narrow(part.dim, start, end - start) for start, end in part.extents], part.dim)


def _joined(pieces: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def upstream_pieces(entries: Iterable[TensorEntry], architecture: Architecture) -> Iterator[Piece]:
    """The native pieces of upstream's tensors, in their order; derived buffers keep their names."""
    for entry in entries:
        if DERIVED.search(entry.name):
            yield Piece(entry.name, entry)
            continue
        match = match_upstream(entry.name, architecture.kind)
        for part, name in enumerate(match.native_names):
            yield Piece(name, entry, match.rule if match.rule.fusion else None, part)


def plan_native(pieces: Iterable[Piece], architecture: Architecture, change: Change = unchanged) -> list[Planned]:
    """Plan to write native tensors; derived buffers are left out."""
    return [Planned(piece.name, (piece,), architecture, change) for piece in pieces if not DERIVED.search(piece.name)]


def plan_upstream(pieces: Iterable[Piece], architecture: Architecture, change: Change = unchanged) -> list[Planned]:
    """Plan to write native tensors in upstream's layout, in the order of their first pieces.

    Raises:
        IncompleteTensor: a part of a fused tensor is missing.
    """
    by_name = {piece.name: piece for piece in pieces}
    planned: dict[str, Planned] = {}
    for name, piece in by_name.items():
        if DERIVED.search(name):
            planned[name] = Planned(name, (piece,), architecture, change)
            continue
        match = match_native(name, architecture.kind)
        if match.upstream_name in planned:
            continue
        if absent := [part for part in match.native_names if part not in by_name]:
            raise IncompleteTensor(f"{match.upstream_name} cannot be joined: {', '.join(absent)} is not there")
        parts = tuple(by_name[part] for part in match.native_names)
        planned[match.upstream_name] = Planned(match.upstream_name, parts, architecture, change, match.rule)
    return list(planned.values())


def split_by_size(planned: Sequence[Planned], limit: int) -> dict[str, list[Planned]]:
    """File name to tensors, in order, with at most `limit` bytes a file unless a single tensor is larger."""
    groups: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    count = len(groups)
    return {f"model-{number:05}-of-{count:05}.safetensors": group for number, group in enumerate(groups, start=1)}


def split_as_before(planned: Sequence[Planned], weight_map: Mapping[str, str]) -> dict[str, list[Planned]] | None:
    """File name to tensors as in an earlier index; None when the index lacks a tensor."""
    if any(tensor.name not in weight_map for tensor in planned):
        return None
    files: dict[str, list[Planned]] = {}
    for tensor in planned:
        files.setdefault(weight_map[tensor.name], []).append(tensor)
    return dict(sorted(files.items()))


def write_shards(files: Mapping[str, Sequence[Planned]], directory: Path) -> Iterator[str]:
    """Write the files and their index, yielding each file's name once it is complete; one tensor is in memory."""
    for file, planned in files.items():
        _write_shard(planned, directory / file)
        yield file
    if len(files) > 1:
        _write_index(files, directory)


def _write_shard(planned: Sequence[Planned], path: Path) -> None:
    ordered = sorted(planned, key=place_in_file)
    write_tensors(ordered, (tensor.make(read_tensor) for tensor in ordered), path)


def place_in_file(tensor: Described) -> tuple[int, str]:
    """The key by which safetensors orders the tensors of a file."""
    return -_RANKS[tensor.dtype], tensor.name


def write_tensors(described: Sequence[Described], tensors: Iterable[torch.Tensor], path: Path) -> None:
    """Write the same bytes as safetensors' save_file, which needs all tensors in memory.

    Args:
        described: in the order of `place_in_file`.
        tensors: in the same order; each is written as it comes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in described:
        start, end = end, end + each.nbytes
        header[each.name] = {
            "dtype": DTYPE_NAMES[each.dtype],
            "shape": list(each.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_ALIGNMENT, "little"))
        file.write(text)
        for tensor in tensors:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


_ALIGNMENT = 8  # bytes, of the header's length and its end (safetensors' format)
_RANKS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # safetensors puts the wider types first


def _write_index(files: Mapping[str, Sequence[Planned]], directory: Path) -> None:
    weight_map = {tensor.name: file for file, planned in files.items() for tensor in planned}
    total = sum(tensor.nbytes for planned in files.values() for tensor in planned)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

"""A checkpoint rewritten under other names, a shard at a time: memory for about two, whatever the model's size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .config import Architecture
from .files import INDEX_FILE, SINGLE_FILE, TensorEntry
from .tensors import DERIVED, IncompleteTensor, Match, join_fused, match_native, match_upstream, split_fused


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: what it is made of, and how.

    Attributes:
        sources: the tensors to read; several where they are joined.
        part: which one to keep where a source is split; None where there is nothing to split.
        nbytes: size of the result.
    """

    name: str
    sources: tuple[TensorEntry, ...]
    match: Match | None
    part: int | None
    nbytes: int

    def make(self, parts: tuple[torch.Tensor, ...], architecture: Architecture) -> torch.Tensor:
        """The tensor from its sources; values are moved, never changed."""
        if self.match is None:
            return parts[0].contiguous()
        if self.part is not None:
            return split_fused(parts[0], self.match.rule, architecture)[self.part]
        return join_fused(parts, self.match.rule, architecture).contiguous()


def plan_native(entries: Sequence[TensorEntry], architecture: Architecture) -> list[Planned]:
    """Upstream's tensors as native ones, in their order."""
    planned = []
    for entry in entries:
        if DERIVED.search(entry.name):
            continue
        match = match_upstream(entry.name, architecture.kind)
        whole = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        parts = split_fused(whole, match.rule, architecture)
        for number, (name, part) in enumerate(zip(match.native_names, parts, strict=True)):
            planned.append(Planned(name, (entry,), match, number if match.rule.fusion else None, part.nbytes))
    return planned


def plan_upstream(entries: Mapping[str, TensorEntry], architecture: Architecture) -> list[Planned]:
    """Native tensors (current name to entry) as upstream's, in the order in which they come first.

    Raises:
        IncompleteTensor: a part of a fused tensor is not there.
    """
    matches = {(match := match_native(name, architecture.kind)).upstream_name: match for name in entries}
    planned = []
    for name, match in matches.items():
        if absent := [part for part in match.native_names if part not in entries]:
            raise IncompleteTensor(f"{name} cannot be joined: {', '.join(absent)} is not there")
        sources = tuple(entries[part] for part in match.native_names)
        planned.append(Planned(name, sources, match, None, sum(_nbytes(source) for source in sources)))
    return planned


def _nbytes(entry: TensorEntry) -> int:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta").nbytes


def split_by_size(planned: Sequence[Planned], limit: int) -> dict[str, list[Planned]]:
    """File name to tensors, in order, no file over `limit` bytes unless one tensor is; one file has the plain name."""
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
    """File name to tensors as an earlier index had it; None when that does not know one of them."""
    if any(tensor.name not in weight_map for tensor in planned):
        return None
    files: dict[str, list[Planned]] = {}
    for tensor in planned:
        files.setdefault(weight_map[tensor.name], []).append(tensor)
    return dict(sorted(files.items()))


def write_shards(files: Mapping[str, Sequence[Planned]], architecture: Architecture, directory: Path) -> Iterator[str]:
    """Write the files, giving each name when it is there. In memory: one file's tensors and what they are made of."""
    for file, planned in files.items():
        _write_shard(planned, architecture, directory / file)
        yield file
    if len(files) > 1:
        _write_index(files, directory)


def _write_shard(planned: Sequence[Planned], architecture: Architecture, path: Path) -> None:
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def read(entry: TensorEntry) -> torch.Tensor:
            if entry.file not in opened:
                opened[entry.file] = stack.enter_context(safe_open(entry.file, framework="pt"))
            tensor: torch.Tensor = opened[entry.file].get_tensor(entry.name)
            return tensor

        tensors = {
            tensor.name: tensor.make(tuple(read(source) for source in tensor.sources), architecture)
            for tensor in planned
        }
        save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only their owner reads


def _write_index(files: Mapping[str, Sequence[Planned]], directory: Path) -> None:
    weight_map = {tensor.name: file for file, planned in files.items() for tensor in planned}
    total = sum(tensor.nbytes for planned in files.values() for tensor in planned)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

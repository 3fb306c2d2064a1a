"""Several rows in one sequence: which rows go together, told by their sizes alone, the same on every rank."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from internvl_trainer.data.sampler import EpochRows, Order, Position, shuffle_rows

_CHUNK = 1 << 16  # rows turned into Python's numbers at a time; bounds memory

Pack = tuple[Position, ...]
"""Rows of one sequence, in order."""


class PackLimits(NamedTuple):
    """What a pack may hold, and how many are open at a time (upstream's max_buffer_size)."""

    max_tokens: int
    max_tiles: int
    buffer_size: int


@dataclass
class _OpenPack:
    rows: list[int] = field(default_factory=list)
    tokens: int = 0
    tiles: int = 0


def pack_rows(tokens: np.ndarray, tiles: np.ndarray, limits: PackLimits) -> Iterator[list[int]]:
    """Every index of `tokens` in exactly one pack, first come, best fit.

    A row goes into the fullest open pack that has room for it, as in upstream's PackedDataset, else into a new one;
    when more than `buffer_size` are open, the fullest is closed. A row that alone exceeds a limit is a pack by itself.

    Args:
        tokens, tiles: (n,) sizes of the rows, in the order they come.
    """
    buffer: list[_OpenPack] = []  # the emptiest first
    fullness: list[int] = []  # tokens of each, to search in
    for row, row_tokens, row_tiles in _rows(tokens, tiles):
        place = bisect_right(fullness, limits.max_tokens - row_tokens) - 1
        while place >= 0 and buffer[place].tiles + row_tiles > limits.max_tiles:
            place -= 1
        pack = _OpenPack()
        if place >= 0:
            pack = buffer.pop(place)
            fullness.pop(place)
        pack.rows.append(row)
        pack.tokens += row_tokens
        pack.tiles += row_tiles
        if pack.tokens >= limits.max_tokens:
            yield pack.rows
            continue
        place = bisect_right(fullness, pack.tokens)
        buffer.insert(place, pack)
        fullness.insert(place, pack.tokens)
        if len(buffer) > limits.buffer_size:
            fullness.pop()
            yield buffer.pop().rows
    yield from (pack.rows for pack in reversed(buffer))


def _rows(tokens: np.ndarray, tiles: np.ndarray) -> Iterator[tuple[int, int, int]]:
    for start in range(0, len(tokens), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        numbers = range(start, min(start + _CHUNK, len(tokens)))
        yield from zip(numbers, tokens[chunk].tolist(), tiles[chunk].tolist(), strict=True)


class PackedOrder(Order[Pack]):
    """An endless stream of packs, told by position alone; the packs of an epoch hold each of its rows once.

    The packs of an epoch are a function of (seed, epoch, sizes), so a run that resumes needs no packer's state: it
    plans the epochs before it anew, which reads no row, and goes on with the pack it stopped at. No pack has rows of
    two epochs.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        limits: PackLimits,
        global_batch: int,
        seed: int,
        epoch_rows: EpochRows | None = None,
    ) -> None:
        """`sizes`: (rows, 2) tokens and tiles of each row; `epoch_rows`: as for GlobalOrder.

        Raises ValueError when there is no row.
        """
        super().__init__(global_batch)
        if len(sizes) == 0:
            raise ValueError("there are no rows to pack")
        self._sizes, self._limits = sizes, limits
        self._epoch_rows = epoch_rows or partial(shuffle_rows, len(sizes), seed)
        self._starts = [0]  # first pack of each epoch planned so far, then the end of the last
        self._planned: tuple[int, np.ndarray, np.ndarray] | None = None

    def count_steps(self, epochs: float, max_steps: int | None) -> int:
        """`max_steps` when given, as upstream's endless stream has it; else the whole batches of so many epochs."""
        if max_steps is not None:
            return max_steps
        whole = int(epochs)
        packs = self._start(whole)
        if epochs > whole:
            packs += int((epochs - whole) * (self._start(whole + 1) - packs))
        return max(1, packs // self.global_batch)

    def epochs_done(self, steps: int) -> float:
        """How many times the rows have come up after `steps` steps."""
        position = steps * self.global_batch
        epoch = self._epoch_of(position)
        start, end = self._start(epoch), self._start(epoch + 1)
        return epoch + (position - start) / (end - start)

    def _draw(self, position: int) -> Pack:
        epoch = self._epoch_of(position)
        order, ends = self._plan(epoch)
        pack = position - self._starts[epoch]
        rows = order[ends[pack - 1] if pack else 0 : ends[pack]]
        return tuple(Position(epoch, row) for row in rows.tolist())

    def _epoch_of(self, position: int) -> int:
        while self._starts[-1] <= position:
            self._start(len(self._starts))
        return bisect_right(self._starts, position) - 1

    def _start(self, epoch: int) -> int:
        """Packs before an epoch."""
        while len(self._starts) <= epoch:
            _, ends = self._plan(len(self._starts) - 1)
            self._starts.append(self._starts[-1] + len(ends))
        return self._starts[epoch]

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) rows of an epoch, pack after pack, and (packs,) where each pack ends in it."""
        if self._planned is None or self._planned[0] != epoch:
            order = self._epoch_rows(epoch)
            packed, ends, end = np.empty(len(order), np.int32), [], 0
            for rows in pack_rows(self._sizes[order, 0], self._sizes[order, 1], self._limits):
                packed[end : end + len(rows)] = order[rows]
                end += len(rows)
                ends.append(end)
            self._planned = epoch, packed, np.array(ends)
        return self._planned[1:]

"""Which rows a step learns from: one order for all ranks, a function of (seed, epoch), told by position alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import numpy as np

_GROUPED_BATCHES = 50  # rows sorted by length at a time, in global batches, as transformers' group_by_length does


@dataclass(frozen=True)
class Position:
    """One draw: row `row` as it comes up in `epoch`; augmentation may depend on both."""

    epoch: int
    row: int


class TokenBudget(NamedTuple):
    """The most tokens in a micro-batch.

    Attributes:
        tokens: (rows,) of each row.
    """

    limit: int
    tokens: np.ndarray


Draw = TypeVar("Draw")
EpochRows = Callable[[int], np.ndarray]
"""Epoch to the rows that it draws, in order; as many in each epoch."""


class Order(ABC, Generic[Draw]):
    """An endless stream of draws, each told by its position alone, cut into global batches."""

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch

    @abstractmethod
    def count_steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of a run of so many epochs."""

    @abstractmethod
    def epochs_done(self, steps: int) -> float:
        """How many times the rows have come up after `steps` steps."""

    @abstractmethod
    def _draw(self, position: int) -> Draw: ...

    def batch(self, step: int) -> list[Draw]:
        """The draws of one optimizer step, in order."""
        first = step * self.global_batch
        return [self._draw(position) for position in range(first, first + self.global_batch)]

    def windows(
        self, first_step: int, total_steps: int, *, rank: int, world_size: int, micro_batch: int
    ) -> Iterator[list[list[Draw]]]:
        """The micro-batches of one rank in each step from `first_step` on, equally many on every rank.

        The global batch is cut into micro-batches, which are dealt out: to each rank in turn, then to the first again.
        """
        for step in range(first_step, total_steps):
            yield self._cut(self.batch(step), micro_batch, world_size)[rank::world_size]

    def _cut(self, draws: list[Draw], micro_batch: int, world_size: int) -> list[list[Draw]]:
        """The draws of a step in micro-batches of so many, a multiple of the ranks."""
        return [draws[start : start + micro_batch] for start in range(0, len(draws), micro_batch)]


class GlobalOrder(Order[Position]):
    """A stream of rows, each epoch a permutation of all rows.

    Batches run on over the end of an epoch, so no row is left out but those after the last whole batch of the run.
    With `lengths` (any measure of a row's length), rows of one stretch of 50 global batches are sorted, longest
    first, so that a batch holds rows of like length.
    """

    def __init__(
        self,
        rows: int,
        global_batch: int,
        seed: int,
        lengths: np.ndarray | None = None,
        epoch_rows: EpochRows | None = None,
        budget: TokenBudget | None = None,
    ) -> None:
        """`epoch_rows`: draws `rows` rows in each epoch; None draws each once, shuffled.

        Args:
            budget: of the tokens in a micro-batch; None: none.
        """
        super().__init__(global_batch)
        self._budget = budget
        self._rows, self._lengths = rows, lengths
        self._epoch_rows = epoch_rows or partial(shuffle_rows, rows, seed)
        self._cached: tuple[int, np.ndarray] | None = None

    def count_steps(self, epochs: float, max_steps: int | None) -> int:
        """The whole batches in epochs x rows (at least one), or `max_steps` if fewer."""
        return count_steps(self._rows, self.global_batch, epochs, max_steps)

    def epochs_done(self, steps: int) -> float:
        """Rows drawn over rows there are."""
        return steps * self.global_batch / self._rows

    def _cut(self, draws: list[Position], micro_batch: int, world_size: int) -> list[list[Position]]:
        if self._budget is None:
            return super()._cut(draws, micro_batch, world_size)
        sizes = [int(self._budget.tokens[draw.row]) for draw in draws]
        ends = cut_by_tokens(sizes, self._budget.limit, micro_batch, world_size)
        return [draws[start:end] for start, end in pairwise([0, *ends])]

    def _draw(self, position: int) -> Position:
        epoch, offset = divmod(position, self._rows)
        return Position(epoch, int(self._epoch_order(epoch)[offset]))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != epoch:
            order = self._epoch_rows(epoch)
            if self._lengths is not None:
                order = self._group_by_length(order, self._lengths)
            self._cached = epoch, order
        return self._cached[1]

    def _group_by_length(self, order: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        stretch = _GROUPED_BATCHES * self.global_batch
        pieces = [order[start : start + stretch] for start in range(0, len(order), stretch)]
        return np.concatenate([piece[np.argsort(-lengths[piece], kind="stable")] for piece in pieces])


def cut_by_tokens(sizes: Sequence[int], limit: int, most_rows: int, multiple: int) -> list[int]:
    """Where each of a step's micro-batches ends, in draws of these sizes.

    A micro-batch closes when the next row would exceed `limit` tokens or `most_rows` rows; a longer row is one by
    itself. The largest are then halved until their number is a multiple of `multiple`, which divides that of the rows.
    """
    ends, tokens, start = [], 0, 0
    for place, size in enumerate(sizes):
        if place > start and (tokens + size > limit or place - start == most_rows):
            ends.append(place)
            tokens, start = 0, place
        tokens += size
    ends.append(len(sizes))
    while len(ends) % multiple:
        parts = [(start, end) for start, end in pairwise([0, *ends]) if end - start > 1]
        start, end = max(parts, key=lambda part: sum(sizes[slice(*part)]))
        ends = sorted([*ends, (start + end) // 2])
    return ends


def shuffle_rows(rows: int, seed: int, epoch: int) -> np.ndarray:
    """(rows,) the order in which an epoch brings up the rows."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def count_steps(rows: int, global_batch: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run: the whole batches in epochs x rows (at least one), or `max_steps` if fewer."""
    steps = max(1, int(rows * epochs) // global_batch)
    return steps if max_steps is None else min(steps, max_steps)

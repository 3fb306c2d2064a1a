"""Which rows a step learns from: one order for all ranks, a function of (seed, epoch), told by position alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import numpy as np

_GROUPED_BATCHES = 50  # rows sorted by length at a time, in global batches, as transformers' group_by_length does


@dataclass(frozen=True)
class Position:
    """One draw: row `row` as it comes up in `epoch`; augmentation may depend on both."""

    epoch: int
    row: int


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

    def micro_batches(
        self, first_step: int, total_steps: int, *, rank: int, world_size: int, micro_batch: int
    ) -> Iterator[list[Draw]]:
        """What one rank works through, micro-batch by micro-batch, from `first_step` on.

        The global batch is dealt out in runs of `micro_batch`: to each rank in turn, then to the first again.
        """
        for step in range(first_step, total_steps):
            draws = self.batch(step)
            for start in range(rank * micro_batch, len(draws), world_size * micro_batch):
                yield draws[start : start + micro_batch]


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
    ) -> None:
        """`epoch_rows`: draws `rows` rows in each epoch; None draws each once, shuffled."""
        super().__init__(global_batch)
        self._rows, self._lengths = rows, lengths
        self._epoch_rows = epoch_rows or partial(shuffle_rows, rows, seed)
        self._cached: tuple[int, np.ndarray] | None = None

    def count_steps(self, epochs: float, max_steps: int | None) -> int:
        """The whole batches in epochs x rows (at least one), or `max_steps` if fewer."""
        return count_steps(self._rows, self.global_batch, epochs, max_steps)

    def epochs_done(self, steps: int) -> float:
        """Rows drawn over rows there are."""
        return steps * self.global_batch / self._rows

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


def shuffle_rows(rows: int, seed: int, epoch: int) -> np.ndarray:
    """(rows,) the order in which an epoch brings up the rows."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def count_steps(rows: int, global_batch: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run: the whole batches in epochs x rows (at least one), or `max_steps` if fewer."""
    steps = max(1, int(rows * epochs) // global_batch)
    return steps if max_steps is None else min(steps, max_steps)

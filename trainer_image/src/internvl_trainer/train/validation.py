"""The loss on held-out rows (data.validation), taken between two steps without changing the training curve.

Training's state stays the same: dropout is off, there are no gradients, and each micro-batch of training sets the seed
of dropout and drop path itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from internvl_trainer.data.loader import Collate, Loader, RowDataset
from internvl_trainer.data.sampler import Position
from internvl_trainer.distributed import Group
from internvl_trainer.retrieval.pair_dataset import PairDataset
from internvl_trainer.train.engine import forward
from internvl_trainer.train.step_losses import StepLosses


class Validation:
    """All rows of data.validation, distributed over the ranks in batches that do not depend on the world size.

    The loss is therefore the same for any world size: an exact sum over the same batches.
    """

    def __init__(
        self,
        rows: RowDataset | PairDataset,
        group: Group,
        *,
        collation: Collate,
        micro_batch: int,
        workers: int,
        datasets: Sequence[str] = (),
    ) -> None:
        """`datasets`: names, by the numbers in a batch's `sources`."""
        self._rows, self._group, self._datasets = rows, group, datasets
        self.by_dataset: dict[str, float] | None = None
        self._collation = collation
        self._micro_batch, self._workers = micro_batch, workers

    def loss(self, engine: Any, is_stopping: Callable[[], bool]) -> float | None:
        """Mean loss of a supervised token, or of a pair. All ranks call it, and get the same number.

        `by_dataset` then has the loss of each dataset, where there are several.

        None when any rank was stopped meanwhile. Raises UserError for a row that cannot be read.
        """
        engine.eval()
        try:
            own = self._own_sums(engine, is_stopping)
        finally:
            engine.train()
        if own is None:
            return None
        shares = self._group.gather(own)
        self.by_dataset = self._means([values for share in shares for *_, values in share])
        sums, tokens = zip(*(pair for share in shares for *pair, _ in share), strict=True)
        return math.fsum(sums) / (sum(tokens) or 1)

    def _means(self, batches: list[list[float]]) -> dict[str, float] | None:
        """Loss of each dataset; exact sums, so that the world size does not matter."""
        return StepLosses(self._datasets).means([math.fsum(values) for values in zip(*batches, strict=True)])

    @torch.no_grad()
    def _own_sums(self, engine: Any, is_stopping: Callable[[], bool]) -> list[tuple[float, int, list[float]]] | None:
        """Losses, supervised tokens, and both by dataset, of each batch of this rank; None when stopped."""
        counted = self._batches_of(self._group.rank)
        loader = Loader(
            self._rows,
            ([batch] for batch in self._in_step(counted)),
            collation=self._collation,
            workers=self._workers,
            pin_memory=self._group.device.type == "cuda",
        )
        sums = []
        for number in range(self._rounds):
            if self._group.any(is_stopping()):
                return None
            window = loader.window()
            losses = StepLosses(self._datasets)
            forward(engine, window.batches[0], self._group.device, losses)
            if number < len(counted):
                total, parts = losses.read()
                sums.append((total, window.supervised_tokens, parts))
        return sums

    def _batches_of(self, rank: int) -> list[list[Position]]:
        """The batches that a rank counts: every world-size-th one."""
        starts = range(rank * self._micro_batch, len(self._rows), self._group.world_size * self._micro_batch)
        last = len(self._rows)
        return [[Position(0, row) for row in range(start, min(last, start + self._micro_batch))] for start in starts]

    def _in_step(self, batches: list[list[Position]]) -> Iterator[list[Position]]:
        """The rank's batches, filled up with the first row: ZeRO-3 needs the same number of forwards on every rank."""
        yield from batches
        yield from [[Position(0, 0)]] * (self._rounds - len(batches))

    @property
    def _rounds(self) -> int:
        """Forwards of each rank: as many as rank 0 has batches, which has the most."""
        return len(self._batches_of(0))

"""Datasets mixed by weight or temperature: which rows an epoch draws, as a function of (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from .dataset_meta import DatasetDescription


class MixedRows:
    """The rows of each epoch: as many as the datasets have together, of each dataset its share.

    A dataset's rows come up in permutations, one after the other, which go on from one epoch to the next: no row comes
    up a second time before all others of its dataset have come up. The draws of an epoch are then shuffled.
    """

    def __init__(self, sizes: Sequence[int], shares: np.ndarray, seed: int) -> None:
        """`sizes`: rows of each dataset; `shares`: their parts of an epoch, which sum to 1."""
        self._sizes, self._seed = list(sizes), seed
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])
        self.counts = split_exactly(sum(self._sizes), shares)

    def __call__(self, epoch: int) -> np.ndarray:
        """(rows,) rows that the epoch draws, in order; a row counts through all datasets."""
        drawn = [self._rows_of(dataset, epoch) for dataset in range(len(self._sizes))]
        return np.random.default_rng([self._seed, epoch]).permutation(np.concatenate(drawn))

    def _rows_of(self, dataset: int, epoch: int) -> np.ndarray:
        size, count = self._sizes[dataset], int(self.counts[dataset])
        first, last = epoch * count, (epoch + 1) * count
        passes = range(first // size, -(-last // size)) if count else range(0)
        rows = [np.random.default_rng([self._seed, dataset, each]).permutation(size) for each in passes]
        drawn = np.concatenate(rows or [np.empty(0, np.int64)])
        skipped = first - passes.start * size
        chosen: np.ndarray = self._starts[dataset] + drawn[skipped : skipped + count]
        return chosen


def mixed_rows(
    datasets: Sequence[DatasetDescription], sizes: Sequence[int], temperature: float | None, seed: int
) -> MixedRows | None:
    """The mixture of a run; None where every row comes up once in an epoch.

    Raises:
        UserError: only some datasets have a weight, there are weights and a temperature, or a weight gives no row.
    """
    weights = [dataset.weight for dataset in datasets]
    if all(weight is None for weight in weights):
        if temperature is None:
            return None
        return MixedRows(sizes, _normalised(np.array(sizes, float) ** (1 / temperature)), seed)
    if temperature is not None:
        raise UserError("MixingInvalid", "datasets have weights; remove them or mixingTemperature", "spec.data")
    if missing := next((each.name for each in datasets if each.weight is None), None):
        message = f"dataset {missing!r} has no weight, others have one; give every dataset a weight, or none"
        raise UserError("MixingInvalid", message, "spec.data")
    empty = np.array([size == 0 for size in sizes])
    mixture = MixedRows(sizes, _normalised(np.where(empty, 0.0, np.array(weights, float))), seed)
    never = (each.name for each, count, size in zip(datasets, mixture.counts, sizes, strict=True) if size and not count)
    if name := next(never, None):
        message = f"dataset {name!r} gets none of the {sum(sizes)} rows of an epoch; raise its weight, or leave it out"
        raise UserError("MixingInvalid", message, "spec.data")
    return mixture


def split_exactly(total: int, shares: np.ndarray) -> np.ndarray:
    """(n,) whole parts of `total`, by largest remainder."""
    exact = shares * total
    parts: np.ndarray = np.floor(exact).astype(np.int64)
    missing = total - int(parts.sum())
    parts[np.argsort(parts - exact, kind="stable")[:missing]] += 1
    return parts


def _normalised(values: np.ndarray) -> np.ndarray:
    values = values / max(values.max(), np.finfo(float).tiny)  # the sum of huge values is infinite
    shares: np.ndarray = values / values.sum()
    return shares

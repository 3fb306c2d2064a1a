"""How sure a mean difference is: percentile bootstrap over the rows of a test set."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FEWEST_ROWS = 6
"""With five rows, a gain in every row is chance in more than 5 % of cases: 2 / 2^5 by the two-sided sign test."""

_RESAMPLES = 1000
_PERCENTILES = (2.5, 97.5)
_SEED = 0


class Interval(NamedTuple):
    """The 95 % confidence interval of a difference."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is more than noise."""
        return self.low > 0 or self.high < 0


def mean_intervals(differences: np.ndarray) -> list[Interval | None]:
    """An interval of the mean of each column, the same in every call; None with fewer than FEWEST_ROWS rows.

    Args:
        differences: (rows, metrics), each row's figure after minus before.
    """
    rows, metrics = differences.shape
    if rows < FEWEST_ROWS:
        return [None] * metrics
    random = np.random.default_rng(_SEED)
    means = np.stack([differences[random.integers(rows, size=rows)].mean(axis=0) for _ in range(_RESAMPLES)])
    low, high = np.percentile(means, _PERCENTILES, axis=0)
    return [Interval(*pair) for pair in zip(low.tolist(), high.tolist(), strict=True)]

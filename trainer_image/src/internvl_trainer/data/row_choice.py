"""Which rows of a dataset preflight checks: all, or a sample that is spread evenly over it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def choose_rows(rows: int, sample: int | None, seed: int) -> Sequence[int]:
    """Numbers of the rows to check, ascending: all of `rows`, or one drawn from each of `sample` equal stretches.

    The same arguments give the same rows on every machine.
    """
    if sample is None or sample >= rows:
        return range(rows)
    ends = np.arange(sample + 1, dtype=np.int64) * rows // sample
    drawn: list[int] = np.random.default_rng(seed).integers(ends[:-1], ends[1:]).tolist()
    return drawn

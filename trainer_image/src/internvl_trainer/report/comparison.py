"""Every figure before and after training, with the interval of its difference where rows have the figure too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from internvl_api.publish_condition import Figures

from internvl_trainer.report.bootstrap import Interval, mean_intervals
from internvl_trainer.report.plots import metric_rows
from internvl_trainer.report.record import Record, Row, pair_rows

Outcome = Literal["gain", "loss", "noise", "unknown"]
_SAME = 1e-6  # a task's figure is the mean of its rows' when it differs from it by no more


@dataclass(frozen=True)
class Comparison:
    """One figure of a task; `interval` is that of the difference, None where it cannot be told."""

    metric: str
    before: float | None
    after: float | None
    interval: Interval | None = None

    @property
    def outcome(self) -> Outcome:
        """A gain or a loss only when the interval excludes zero."""
        if self.interval is None:
            return "unknown"
        if not self.interval.excludes_zero:
            return "noise"
        return "gain" if self.interval.low > 0 else "loss"


Comparisons = dict[str, list[Comparison]]
"""Task to its figures."""

Answers = tuple[list[Row] | None, list[Row] | None]
"""Rows of a task before and after training."""


def compare(record: Record) -> Comparisons:
    """Every known figure of every task, in the order of the tables."""
    return compare_figures(record.baseline, record.final, record.predictions)


def compare_figures(baseline: Figures, final: Figures, predictions: Mapping[str, Answers]) -> Comparisons:
    """Compare given figures, with intervals from the given rows."""
    compared: Comparisons = {}
    for task, rows in metric_rows(baseline, final):
        differences = {
            metric: after - before for metric, before, after in rows if before is not None and after is not None
        }
        intervals = _intervals(*predictions.get(task, (None, None)), differences)
        compared[task] = [Comparison(*row, intervals.get(row[0])) for row in rows]
    return compared


def _intervals(
    before: list[Row] | None, after: list[Row] | None, differences: Mapping[str, float]
) -> dict[str, Interval]:
    """Intervals of the figures that are means over rows: not of BLEU, METEOR and other figures of a whole corpus."""
    pairs = [(_scores(old), _scores(new)) for old, new in pair_rows(before, after)]
    metrics = [metric for metric in differences if pairs and all(metric in old and metric in new for old, new in pairs)]
    table = np.array([[new[metric] - old[metric] for metric in metrics] for old, new in pairs], dtype=float)
    if not metrics:
        return {}
    found = zip(metrics, table.mean(axis=0), mean_intervals(table), strict=True)
    return {
        metric: interval
        for metric, mean, interval in found
        if interval is not None and math.isclose(mean, differences[metric], rel_tol=0, abs_tol=_SAME)
    }


def _scores(row: Row | None) -> dict[str, float]:
    scores: Any = (row or {}).get("scores")
    if not isinstance(scores, dict):
        return {}
    return {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}

"""Metrics of a task's answers: of the task as a whole and of each row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from internvl_api.publish_condition import GROUNDING_METRICS, VQA_METRICS
from internvl_api.spec.evaluation import TaskKind

from internvl_trainer.data.boxes import box_accuracy
from internvl_trainer.errors import UserError
from internvl_trainer.evaluate.captions import Scores, score_captions
from internvl_trainer.evaluate.vqa import exact_match, vqa_accuracy

RowScore = Callable[[str, Sequence[str]], float]

_BY_ROW: dict[str, dict[str, RowScore]] = {
    "vqa": dict(zip(VQA_METRICS, (exact_match, vqa_accuracy), strict=True)),
    "grounding": dict(zip(GROUNDING_METRICS, (box_accuracy,), strict=True)),
}


def score(name: str, kind: TaskKind, rows: Sequence[Mapping[str, Any]]) -> Scores:
    """Metrics of predictions (`prediction`, `references`), in total and by row.

    Raises:
        UserError: a figure is no number, or cannot be computed.
    """
    predictions, references = [row["prediction"] for row in rows], [row["references"] for row in rows]
    by_row = _BY_ROW.get(kind)
    if by_row is None:
        totals, each = score_captions(predictions, references)
    else:
        pairs = list(zip(predictions, references, strict=True))
        each = [{metric: rate(*pair) for metric, rate in by_row.items()} for pair in pairs]
        totals = {metric: fmean(row[metric] for row in each) for metric in by_row}
    check_finite(name, totals)
    return totals, each


def check_finite(name: str, figures: Mapping[str, float]) -> None:
    """Raises UserError for a figure that nothing can be compared with."""
    for metric, value in figures.items():
        if not math.isfinite(value):
            raise UserError(
                "MetricNotFinite",
                f"{metric} is {value}; look at the predictions and references of this task",
                f"spec.evaluation.tasks.{name}",
            )

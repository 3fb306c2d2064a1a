"""What the evaluation and scoring stages store: predictions with scores, and figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from internvl_api.pipeline import answering_stage
from internvl_api.publish_condition import ANSWER_METRICS
from internvl_api.spec.evaluation import TaskKind, makes_text
from internvl_api.status import EvaluationStatus, StageName

from internvl_trainer.answer_figures import answer_figures
from internvl_trainer.artifacts.output_layout import PREDICTIONS, SCORES
from internvl_trainer.evaluate.chunks import Row, to_lines
from internvl_trainer.evaluate.scores import score

Figures = dict[str, dict[str, float]]
"""Task to metric to value."""


def score_rows(name: str, kind: TaskKind, rows: Sequence[Row]) -> tuple[dict[str, float], list[Row]]:
    """A task's figures, and its rows with their own."""
    if not makes_text(kind):
        from internvl_trainer.evaluate.retrieval_answers import retrieval_figures  # PyTorch: text is scored without it

        return retrieval_figures(rows)
    totals, each = score(name, kind, rows)
    answered = {name: float(f"{value:.4g}") for name, value in answer_figures(rows).items()}  # short, for the status
    return totals | answered, [{**row, "scores": scores} for row, scores in zip(rows, each, strict=True)]


def write_rows(folder: Path, task: str, rows: Sequence[Row]) -> dict[str, Path]:
    """Write a task's predictions; their name in the stage's folder, and the file."""
    path = folder / f"{task}.jsonl"
    path.write_bytes(to_lines(rows))
    return {f"{PREDICTIONS}/{task}.jsonl": path}


def write_figures(folder: Path, figures: Figures) -> dict[str, Path]:
    """Write the figures; their name in the stage's folder, and the file."""
    path = folder / SCORES
    path.write_text(json.dumps(figures, indent=1, sort_keys=True), encoding="utf-8")
    return {SCORES: path}


def status_of(stage: StageName, figures: Figures) -> EvaluationStatus:
    """The figures in the form of the status."""
    is_baseline = "baseline-evaluate" in (stage, answering_stage(stage))
    return EvaluationStatus(baseline=figures) if is_baseline else EvaluationStatus(final=figures)


def summary(figures: Figures) -> str:
    """One line: coco: BLEU_1 0.7123, …"""
    parts = []
    for name, metrics in figures.items():
        shown = {metric: value for metric, value in metrics.items() if metric not in ANSWER_METRICS}
        parts.append(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in shown.items()))
    return "; ".join(parts)

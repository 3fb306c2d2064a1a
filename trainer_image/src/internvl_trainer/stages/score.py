"""The scoring stages: score the captions of an evaluation stage, without a GPU."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from internvl_api.pipeline import answering_stage
from internvl_api.spec.evaluation import is_caption
from internvl_api.status import StageResult

from internvl_trainer.artifacts.output_layout import PREDICTIONS, SCORES
from internvl_trainer.evaluate.captions import check_tools
from internvl_trainer.evaluate.results import Figures, score_rows, status_of, summary, write_figures, write_rows
from internvl_trainer.report.record import read_lines
from internvl_trainer.run_context import RunContext


def run(context: RunContext) -> StageResult:
    """Store the captions with their scores, and the figures of every task; the manifest last.

    Raises:
        UserError: a tool is missing or fails, or the evaluation is not done.
    """
    stage, stages = context.stage, context.stages
    captions = {name: task for name, task in context.config.evaluation.tasks.items() if is_caption(task.task)}
    answering = answering_stage(stage)
    assert answering is not None
    check_tools()
    answered = stages.require(answering)
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="score-") as name:
        scratch = Path(name)
        needed = {SCORES, *(f"{PREDICTIONS}/{name}.jsonl" for name in captions)}
        stages.fetch(answering, [file for file in answered.files if file.path in needed], scratch)
        figures.update(json.loads((scratch / SCORES).read_text(encoding="utf-8")))
        files: dict[str, Path] = {}
        for task, settings in captions.items():
            context.reporter.doing(f"scoring {task}")
            rows = read_lines((scratch / PREDICTIONS / f"{task}.jsonl").read_bytes())
            figures[task], scored = score_rows(task, settings.task, rows)
            files |= write_rows(scratch, task, scored)
        files |= write_figures(scratch, figures)
        described = stages.upload(stage, files)
    evaluation = status_of(stage, figures)
    stages.commit(stage, described, evaluation=evaluation.to_dict())
    return StageResult(
        stage=stage, outcome="succeeded", reason="Scored", message=summary(figures), evaluation=evaluation
    )

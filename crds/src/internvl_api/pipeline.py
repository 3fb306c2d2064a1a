"""The stages of a run in their order; operator and trainer both ask here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from internvl_api.spec.evaluation import Evaluation, is_caption
from internvl_api.status import StageName

if TYPE_CHECKING:
    from internvl_api.run_config import RunConfig
    from internvl_api.spec import InternVLFineTuneSpec

AnsweringStage = Literal["baseline-evaluate", "evaluate"]

# Stages that run on GPUs, as a group of spec.workers pods; every other stage is one pod on the CPU, or
# data.preflight.workers of them.
PARALLEL_STAGES: frozenset[StageName] = frozenset({"doctor", "baseline-evaluate", "train", "evaluate"})

SCORED_BY: dict[AnsweringStage, StageName] = {"baseline-evaluate": "baseline-score", "evaluate": "score"}
"""The stage that scores the captions of an evaluation, without GPUs: Java takes minutes for it."""


def stage_names(run: InternVLFineTuneSpec | RunConfig) -> tuple[StageName, ...]:
    """Names of a run's stages: preflight and publish always, the others where the run asks for them."""
    trains, evaluation, formats = run.trains, run.evaluation, run.merge.formats
    before, after = bool(evaluation.tasks) and evaluation.baseline and trains, bool(evaluation.tasks)
    captions = has_captions(evaluation)
    wanted: dict[StageName, bool] = {
        "preflight": True,
        "doctor": run.doctor.enabled,  # before the first stage that uses what it checks
        "baseline-evaluate": before,
        "baseline-score": before and captions,
        "train": trains,
        "evaluate": after,
        "score": after and captions,
        # Full training writes a whole model in upstream's format anyway.
        "merge": trains and (bool(formats) if run.method == "lora" else "hf" in formats),
        "publish": True,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def has_captions(evaluation: Evaluation) -> bool:
    """Whether a task's answers are captions; the answers of all others are scored where they are made."""
    return any(is_caption(task.task) for task in evaluation.tasks.values())


def figures_stage(answering: AnsweringStage, evaluation: Evaluation) -> StageName:
    """The stage whose result has all figures of an evaluation."""
    return SCORED_BY[answering] if has_captions(evaluation) else answering


def answering_stage(scoring: StageName) -> AnsweringStage | None:
    """The evaluation that a stage scores; None for every other stage."""
    return next((answering for answering, scored_by in SCORED_BY.items() if scored_by == scoring), None)

"""publishIf: whether the figures of the trained model are good enough to publish."""

from __future__ import annotations

import os

from internvl_api.pipeline import PARALLEL_STAGES, figures_stage
from internvl_api.publish_condition import ConditionError, holds
from internvl_api.run_config import RunConfig
from internvl_api.status import EvaluationStatus, StageName, StageResult

from internvl_trainer.artifacts.output_layout import REPORT, REPORT_PAGE
from internvl_trainer.distributed import Rendezvous, join_group
from internvl_trainer.errors import Rejected, UserError
from internvl_trainer.stage_store import StageStore

_FIELD = "spec.evaluation.publishIf"


def check_publish_condition(stages: StageStore, result: StageResult) -> None:
    """Compare the figures of the stage that has all of them with publishIf.

    All ranks call it; rank 0 writes the report.

    Raises:
        Rejected: they do not meet it; what was trained is kept, and a report is written.
        UserError: the condition names a figure that was not measured.
    """
    condition = stages.config.evaluation.publish_if
    if condition is None:
        return
    before = stages.result(figures_stage("baseline-evaluate", stages.config.evaluation))
    figures = figures_of(result, before)
    try:
        met, compared = holds(condition, figures.final, figures.baseline)
    except ConditionError as error:
        raise UserError("ConditionUnusable", str(error), _FIELD) from error
    if not met:
        trains = stages.config.trains
        raise Rejected(_refusal(result.stage, compared, _kept(stages, result.stage), figures, trains=trains))


def meets_publish_condition(config: RunConfig, figures: EvaluationStatus) -> bool:
    """Whether publishIf, which may have changed since the evaluation, accepts these figures."""
    try:
        condition = config.evaluation.publish_if
        return condition is None or holds(condition, figures.final, figures.baseline)[0]
    except ConditionError:
        return False


def figures_of(after: StageResult | None, before: StageResult | None) -> EvaluationStatus:
    """The figures of both evaluations; `after`: of the trained model, `before`: of the base model."""
    final = after.evaluation.final if after and after.evaluation else {}
    return EvaluationStatus(baseline=before.evaluation.baseline if before and before.evaluation else {}, final=final)


def _refusal(
    stage: StageName, compared: str, artifacts: dict[str, str], figures: EvaluationStatus, *, trains: bool
) -> StageResult:
    kept, step = (", what was trained is kept", "train further") if trains else ("", "evaluate another model")
    return StageResult(
        stage=stage,
        outcome="failed",
        reason="EvaluationBelowThreshold",
        message=f"{compared}; nothing is published{kept}. See the report, then lower publishIf or {step}",
        artifacts=artifacts,
        evaluation=figures,
    )


def _kept(stages: StageStore, stage: StageName) -> dict[str, str]:
    """URIs of the trained weights, if there are any, and of the report, which rank 0 writes while the others wait.

    They have to wait: the first rank that exits with an error ends all.
    """
    kind = {"lora": "adapter", "none": None}.get(stages.config.method, "model")
    weights = {kind: stages.uri("train", kind)} if kind else {}
    kept = {**weights, "report": stages.uri(stage, f"{REPORT}/{REPORT_PAGE}")}
    rendezvous = Rendezvous.from_environment(os.environ)
    several = stage in PARALLEL_STAGES and rendezvous.world_size > 1
    group = join_group(rendezvous, stages.config.device) if several else None
    if rendezvous.rank == 0:
        from internvl_trainer.report.build import write_report  # draws with matplotlib, only for a refusal

        kept["report"] = write_report(stages, folder=stages.key(stage, REPORT))
    if group is not None:
        group.barrier()
    return kept

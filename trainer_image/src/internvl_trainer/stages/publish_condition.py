"""publishIf: whether the figures of the evaluate stage are good enough to publish."""

from __future__ import annotations

import os

from internvl_api.publish_condition import ConditionError, holds
from internvl_api.run_config import RunConfig
from internvl_api.status import EvaluationStatus, StageResult

from internvl_trainer.artifacts.output_layout import REPORT, REPORT_PAGE
from internvl_trainer.distributed import Rendezvous, join_group
from internvl_trainer.errors import Rejected, UserError
from internvl_trainer.stage_store import StageStore

_FIELD = "spec.evaluation.publishIf"


def check_publish_condition(stages: StageStore, result: StageResult) -> None:
    """Compare the evaluate stage's figures with publishIf. All ranks call it; rank 0 writes the report.

    Raises:
        Rejected: they do not meet it; what was made is kept, and a report is written.
        UserError: the condition names a figure that was not measured.
    """
    condition = stages.config.evaluation.publish_if
    if condition is None:
        return
    figures = figures_of(result, stages.result("baseline-evaluate"))
    try:
        met, compared = holds(condition, figures.final, figures.baseline)
    except ConditionError as error:
        raise UserError("ConditionUnusable", str(error), _FIELD) from error
    if not met:
        raise Rejected(_refusal(compared, _kept(stages), figures))


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


def _refusal(compared: str, artifacts: dict[str, str], figures: EvaluationStatus) -> StageResult:
    return StageResult(
        stage="evaluate",
        outcome="failed",
        reason="EvaluationBelowThreshold",
        message=f"{compared}; nothing is published, what was trained is kept. See the report, then lower publishIf or "
        "train further",
        artifacts=artifacts,
        evaluation=figures,
    )


def _kept(stages: StageStore) -> dict[str, str]:
    """URIs of the trained weights and of the report; rank 0 writes both while the other ranks wait.

    They have to wait: the first rank that exits with an error ends all.
    """
    kind = "adapter" if stages.config.method == "lora" else "model"
    kept = {kind: stages.uri("train", kind), "report": stages.uri("evaluate", f"{REPORT}/{REPORT_PAGE}")}
    rendezvous = Rendezvous.from_environment(os.environ)
    group = join_group(rendezvous, stages.config.device) if rendezvous.world_size > 1 else None
    if rendezvous.rank == 0:
        from internvl_trainer.report.build import write_report  # draws with matplotlib, only for a refusal

        kept["report"] = write_report(stages, folder=stages.key("evaluate", REPORT))
    if group is not None:
        group.barrier()
    return kept

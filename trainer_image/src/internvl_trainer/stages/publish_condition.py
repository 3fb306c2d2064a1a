"""publishIf: whether the figures are good enough to go on."""

from __future__ import annotations

import os

from internvl_api.gate import GateError, holds
from internvl_api.run_config import RunConfig
from internvl_api.status import EvaluationStatus, StageResult

from internvl_trainer.artifacts.fingerprint import stage_folder
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.distributed import Rendezvous, join_group
from internvl_trainer.errors import Rejected, UserError
from internvl_trainer.stages.pipeline import find_done

REPORT_FOLDER = f"{stage_folder('evaluate')}/report"
_FIELD = "spec.evaluation.publishIf"


def check_gate(config: RunConfig, storage: Storage, result: StageResult) -> None:
    """Weigh the evaluate stage's figures against publishIf. All ranks call it; rank 0 writes the report.

    Raises:
        Rejected: they do not meet it; what was made is kept, and a report is written.
        UserError: the condition asks for a figure that is not there.
    """
    condition = config.evaluation.publish_if
    if condition is None:
        return
    final = (result.evaluation or EvaluationStatus()).final
    before = find_done("baseline-evaluate", config, storage)
    baseline = before.evaluation.baseline if before and before.evaluation else {}
    try:
        met, compared = holds(condition, final, baseline)
    except GateError as error:
        raise UserError("ConditionUnusable", str(error), _FIELD) from error
    if not met:
        raise Rejected(
            _refusal(compared, _artifacts(config, storage), EvaluationStatus(baseline=baseline, final=final))
        )


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


def _artifacts(config: RunConfig, storage: Storage) -> dict[str, str]:
    """What is kept, and the report, written while the other ranks wait: the first to leave ends all."""
    kind = "adapter" if config.method == "lora" else "model"
    kept = {
        kind: f"{storage.uri}/{stage_folder('train')}/{kind}",
        "report": f"{storage.uri}/{REPORT_FOLDER}/index.html",
    }
    rendezvous = Rendezvous.from_environment(os.environ)
    group = join_group(rendezvous, config.device) if rendezvous.world_size > 1 else None
    if rendezvous.rank == 0:
        from internvl_trainer.report.build import write_report

        kept["report"] = write_report(config, storage, folder=REPORT_FOLDER)
    if group is not None:
        group.barrier()
    return kept

"""The stages in their order; each is skipped when its manifest is there, and writes it last."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from internvl_api.pipeline import stage_names
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName, StageResult

from internvl_trainer.artifacts.downloads import told_to
from internvl_trainer.artifacts.identity import check_output, fingerprint, stage_folder
from internvl_trainer.artifacts.manifest import ManifestError, read_manifest
from internvl_trainer.artifacts.storage import Storage, open_storage
from internvl_trainer.metrics import Reporter
from internvl_trainer.outcome import leave
from internvl_trainer.signals import stop_by_exception, stop_flag


def run_stage(stage: StageName, config: RunConfig, reporter: Reporter) -> StageResult:
    """Do one stage, or find it done. Raises UserError for what the user must mend."""
    work: dict[StageName, Callable[[RunConfig, Storage, Reporter], StageResult]] = {
        "preflight": _preflight,
        "baseline-evaluate": partial(_evaluate, "baseline-evaluate"),
        "train": _train,
        "evaluate": partial(_evaluate, "evaluate"),
        "merge": _merge,
        "publish": _publish,
    }
    storage = open_storage(config.output, field="spec.output")
    check_output(storage, config)
    with told_to(lambda text: reporter.update(detail=text)):
        result = find_done(stage, config, storage) or work[stage](config, storage, reporter)
        if stage == "evaluate" and result.outcome == "succeeded":
            _check_gate(config, storage, result)  # also of figures from before: the condition may have changed since
        return result


def stages_of(config: RunConfig) -> tuple[StageName, ...]:
    """The stages of this run, in their order."""
    return stage_names(config.method, config.evaluation, config.merge)


def find_done(stage: StageName, config: RunConfig, storage: Storage) -> StageResult | None:
    """The result of an earlier attempt that finished this stage of this run."""
    try:
        manifest = read_manifest(storage, stage_folder(stage))
    except ManifestError:
        return None
    if manifest is None or manifest.fingerprint != fingerprint(config, stage):
        return None
    return StageResult(
        stage=stage,
        outcome="succeeded",
        reason="AlreadyDone",
        message=f"done at {manifest.created}",
        progress=manifest.extra.get("progress"),
        artifacts=manifest.extra.get("artifacts", {}),
        evaluation=manifest.extra.get("evaluation"),
    )


def _preflight(config: RunConfig, storage: Storage, reporter: Reporter) -> StageResult:
    from internvl_trainer.preflight import preflight

    with stop_by_exception():
        return preflight(config, storage, reporter)


def _train(config: RunConfig, storage: Storage, reporter: Reporter) -> StageResult:
    from internvl_trainer.distributed import Rendezvous, join_group

    with stop_flag(lambda: leave("train")) as stop:
        reporter.doing("waiting for the others")
        group = join_group(Rendezvous.from_environment(os.environ), config.device)
        from internvl_trainer.train.loop import train

        return train(config, group, storage, reporter, stop)


def _evaluate(stage: StageName, config: RunConfig, storage: Storage, reporter: Reporter) -> StageResult:
    from internvl_trainer.distributed import Rendezvous, join_group

    with stop_by_exception():
        reporter.doing("waiting for the others")
        group = join_group(Rendezvous.from_environment(os.environ), config.device)
        from internvl_trainer.evaluate.run import evaluate

        return evaluate(stage, config, group, storage, reporter)


def _check_gate(config: RunConfig, storage: Storage, result: StageResult) -> None:
    from internvl_trainer.evaluate.gate import check_gate

    check_gate(config, storage, result)


def _merge(config: RunConfig, storage: Storage, reporter: Reporter) -> StageResult:
    with stop_by_exception():
        if config.model.kind == "retrieval":
            from internvl_trainer.retrieval.merge import merge_retrieval

            return merge_retrieval(config, storage, reporter)
        from internvl_trainer.merge import merge

        return merge(config, storage, reporter)


def _publish(config: RunConfig, storage: Storage, reporter: Reporter) -> StageResult:
    from internvl_trainer.artifacts.publish import publish

    with stop_by_exception():
        return publish(config, storage, reporter)

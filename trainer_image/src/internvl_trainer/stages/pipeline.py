"""Runs one stage: skips it when it is done, else does its work until it is done or told to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from internvl_api.constants import ALREADY_PUBLISHED
from internvl_api.pipeline import PARALLEL_STAGES, SCORED_BY, figures_stage
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName, StageResult

from internvl_trainer.artifacts.download_progress import told_to
from internvl_trainer.artifacts.fenced_storage import FencedStorage, kept_alive, raising_lease_loss
from internvl_trainer.artifacts.lease_record import Owner
from internvl_trainer.artifacts.output_lease import OutputLease
from internvl_trainer.distributed import Rendezvous
from internvl_trainer.metrics import Reporter
from internvl_trainer.run_context import RunContext, open_context
from internvl_trainer.signals import stop_by_exception
from internvl_trainer.stage_store import StageStore, stages_of
from internvl_trainer.stages.publish_condition import check_publish_condition, figures_of, meets_publish_condition
from internvl_trainer.tracking.tracker import tracking


def run_stage(stage: StageName, config: RunConfig, reporter: Reporter) -> StageResult:
    """Do one stage, or find it done. Raises UserError for what the user must correct."""
    several = stage in PARALLEL_STAGES and Rendezvous.from_environment(os.environ).world_size > 1
    tell = told_to(reporter.downloading)
    with leased(open_context(stage, config, reporter)) as (context, finish), tell, tracked(context) as context:
        result = _published(context.stages) if stage == "preflight" else None
        # With several ranks, rank 0 calls begin for all after they have met.
        result = result or (None if several else context.begin()) or _run(context)
        context.tracker.result(result)
        if stage == figures_stage("evaluate", config.evaluation) and result.outcome == "succeeded":
            check_publish_condition(context.stages, result)  # also when it was done: publishIf may have changed since
        if result.outcome == "succeeded" and (stage == "publish" or result.reason == ALREADY_PUBLISHED):
            finish()
        return result


@contextmanager
def tracked(context: RunContext) -> Iterator[RunContext]:
    """Within the block, the context's tracker takes reports, of the first rank."""
    leads = Rendezvous.from_environment(os.environ).rank == 0

    def note(problem: str) -> None:
        context.reporter.update(tracking_problem=problem)

    with tracking(context.config, context.stage, context.storage, note, leads=leads) as tracker:
        yield replace(context, tracker=tracker)


def _published(stages: StageStore) -> StageResult | None:
    """The result of preflight for a run whose stages are all done, so that none needs a pod; else None."""
    done: dict[StageName, StageResult] = {}
    for stage in reversed(stages_of(stages.config)):  # publish first: mostly it is not done, which costs one request
        if (result := stages.result(stage)) is None:
            return None
        done[stage] = result
    before, after = (done.get(figures_stage(each, stages.config.evaluation)) for each in SCORED_BY)
    figures = figures_of(after, before)
    if not meets_publish_condition(stages.config, figures):
        return None
    return StageResult(
        stage="preflight",
        outcome="succeeded",
        reason=ALREADY_PUBLISHED,
        message=f"every stage is done; {done['publish'].message}",
        progress=done["train"].progress if "train" in done else None,
        artifacts=done["publish"].artifacts,
        evaluation=figures,
    )


@contextmanager
def leased(context: RunContext) -> Iterator[tuple[RunContext, Callable[[], None]]]:
    """Within the block, hold the output's lease. Yields the context to use, and a function that marks the run finished.

    Only the first rank takes the lease: what the others store counts only when the first rank commits it.

    Raises:
        UserError: `OutputInUse`, another run is writing there.
        LeaseLost: a later attempt is writing there, or began to within the block.
    """
    if Rendezvous.from_environment(os.environ).rank != 0:
        yield context, lambda: None
        return
    owner = Owner.of_this_process(context.config, context.stage)
    lease = OutputLease(context.storage, owner, tell=context.reporter.doing)
    with stop_by_exception():
        lease.acquire(check=context.stages.check_output)
    with kept_alive(lease, on_loss=_stop_this_process) as finish, raising_lease_loss(lease):
        yield replace(context, storage=FencedStorage(context.storage, lease), epoch=lease.epoch), finish


def _stop_this_process() -> None:
    """End the stage as SIGTERM does; the lost lease refuses the checkpoint that it would save."""
    os.kill(os.getpid(), signal.SIGTERM)


def _run(context: RunContext) -> StageResult:
    """Import and run the stage's module; the import comes late because most of them import PyTorch for seconds.

    The train stage handles signals by itself, because it has state to save.
    """
    with nullcontext() if context.stage == "train" else stop_by_exception():
        match context.stage:
            case "preflight":
                from internvl_trainer.stages.preflight import run
            case "doctor":
                from internvl_trainer.stages.doctor import run
            case "train":
                from internvl_trainer.stages.train import run
            case "baseline-evaluate" | "evaluate":
                from internvl_trainer.stages.evaluate import run
            case "baseline-score" | "score":
                from internvl_trainer.stages.score import run
            case "merge":
                from internvl_trainer.stages.merge import run
            case "publish":
                from internvl_trainer.stages.publish import run
        return run(context)

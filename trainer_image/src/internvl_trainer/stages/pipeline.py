"""Runs one stage: skips it when it is done, else does its work until it is done or told to stop."""

from __future__ import annotations

import os
from contextlib import nullcontext

from internvl_api.pipeline import PARALLEL_STAGES
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName, StageResult

from internvl_trainer.artifacts.download_progress import told_to
from internvl_trainer.distributed import Rendezvous
from internvl_trainer.metrics import Reporter
from internvl_trainer.run_context import RunContext, open_context
from internvl_trainer.signals import stop_by_exception
from internvl_trainer.stages.publish_condition import check_publish_condition


def run_stage(stage: StageName, config: RunConfig, reporter: Reporter) -> StageResult:
    """Do one stage, or find it done. Raises UserError for what the user must correct."""
    context = open_context(stage, config, reporter)
    several = stage in PARALLEL_STAGES and Rendezvous.from_environment(os.environ).world_size > 1
    with told_to(lambda text: reporter.update(detail=text)):
        # Several ranks meet first, and rank 0 finds out for all.
        result = (None if several else context.begin()) or _run(context)
        if stage == "evaluate" and result.outcome == "succeeded":
            check_publish_condition(context.stages, result)  # also when it was done: publishIf may have changed since
        return result


def _run(context: RunContext) -> StageResult:
    """Import and run the stage's module; the import comes late because most of them import PyTorch for seconds.

    The train stage handles signals by itself, because it has state to save.
    """
    with nullcontext() if context.stage == "train" else stop_by_exception():
        match context.stage:
            case "preflight":
                from internvl_trainer.stages.preflight import run
            case "train":
                from internvl_trainer.stages.train import run
            case "baseline-evaluate" | "evaluate":
                from internvl_trainer.stages.evaluate import run
            case "merge":
                from internvl_trainer.stages.merge import run
            case "publish":
                from internvl_trainer.stages.publish import run
        return run(context)

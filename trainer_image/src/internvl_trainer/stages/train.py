"""The train stage: from a base model and rows to trained weights in storage."""

from __future__ import annotations

from internvl_api.status import StageResult

from internvl_trainer.exit_status import leave
from internvl_trainer.run_context import RunContext
from internvl_trainer.signals import stop_flag


def run(context: RunContext) -> StageResult:
    """Train with all ranks. A signal during a step saves a checkpoint; before the first step it ends the process."""
    with stop_flag(lambda: leave("train")) as stop:
        joined = context.join_group()
        if joined.group.world_size > 1 and (result := joined.begin()):
            return result
        from internvl_trainer.train.trainer import train  # slow to import, so after the signals are watched

        return train(joined, stop)

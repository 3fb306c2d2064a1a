"""The evaluation stages: answer the tasks with the base model or the trained one, and score the answers."""

from __future__ import annotations

from internvl_api.status import StageResult

from internvl_trainer.run_context import RunContext


def run(context: RunContext) -> StageResult:
    """Evaluate with all ranks. Answers are stored as they come, so a later attempt goes on from them."""
    joined = context.join_group()
    if joined.group.world_size > 1 and (result := joined.begin()):
        return result
    from internvl_trainer.evaluate.run import evaluate  # slow to import, so after the ranks have met

    return evaluate(joined)

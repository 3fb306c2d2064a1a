"""The merge stage: whole models of the base and what was trained, each checked before it counts."""

from __future__ import annotations

from internvl_api.status import StageResult

from internvl_trainer.run_context import RunContext


def run(context: RunContext) -> StageResult:
    """Write, check and store each format; the manifest last. Raises UserError for what the user must correct."""
    if context.config.model.kind == "retrieval":
        from internvl_trainer.stages.merge.retrieval import merge_retrieval_model

        return merge_retrieval_model(context)
    from internvl_trainer.stages.merge.chat import merge_chat_model

    return merge_chat_model(context)

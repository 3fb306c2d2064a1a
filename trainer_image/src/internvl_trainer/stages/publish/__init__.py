"""The publish stage: what the other stages made, with its record, under artifacts/; then on the Hub if asked to."""

from __future__ import annotations

from internvl_api.run_config import RunConfig
from internvl_api.status import StageResult

from internvl_trainer.artifacts.output_layout import ARTIFACTS
from internvl_trainer.errors import Rejected
from internvl_trainer.run_context import RunContext
from internvl_trainer.stage_store import StageStore
from internvl_trainer.stages.publish.collect import Manifests, finished_stages
from internvl_trainer.stages.publish.hub_upload import publish_to_hub
from internvl_trainer.stages.publish.output import fill_output, find_published, name_artifacts
from internvl_trainer.stages.publish_condition import check_publish_condition


def run(context: RunContext) -> StageResult:
    """Fill artifacts/, then the Hub's repository. What is there already, whole, is not sent again."""
    hub, stages = context.config.publish.hub, context.stages
    made = finished_stages(stages)
    check_recorded_base(context.config, made)
    refuse_below_threshold(stages)
    context.reporter.doing("looking for what is published already")
    manifest = find_published(stages, made) or fill_output(context, made)
    artifacts = name_artifacts(context.storage, manifest)
    if hub:
        artifacts["hub"] = publish_to_hub(context, hub, manifest)
    stages.commit("publish", [], artifacts=artifacts)
    also = f", and {artifacts['hub']}" if hub else ""
    place = f"{context.storage.uri}/{ARTIFACTS}"
    return StageResult(
        stage="publish",
        outcome="succeeded",
        reason="Published",
        message=f"{len(manifest.files)} files, {manifest.size / 1e6:.1f} MB in {place}{also}",
        artifacts=artifacts,
    )


def check_recorded_base(config: RunConfig, made: Manifests) -> None:
    """Raise UserError when the base in a published adapter's card is not the one that it was trained on.

    Merging has already checked it when a whole model is published too.
    """
    recorded = made["train"].extra.get("base")
    if config.method == "lora" and "merge" not in made and recorded:
        from internvl_trainer.model.base_identity import check_base  # imports PyTorch

        check_base(config, recorded)


def refuse_below_threshold(stages: StageStore) -> None:
    """Raises Rejected when the figures do not meet publishIf, for whoever starts this stage by hand."""
    try:
        if evaluated := stages.result("evaluate"):
            check_publish_condition(stages, evaluated)
    except Rejected as error:
        raise Rejected(error.result.model_copy(update={"stage": "publish"})) from error

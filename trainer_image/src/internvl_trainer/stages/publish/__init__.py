"""The publish stage: what the other stages made, with its record, under artifacts/; then on the Hub if asked to."""

from __future__ import annotations

from internvl_api.pipeline import figures_stage
from internvl_api.run_config import RunConfig
from internvl_api.status import StageResult

from internvl_trainer.artifacts.manifest import discard
from internvl_trainer.artifacts.output_layout import ARTIFACTS, checkpoint_folders, kept_checkpoints
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
    remove_checkpoints(context)
    stages.commit("publish", [], artifacts=artifacts)
    also = f", and {artifacts['hub']}" if hub else ""
    exported = made["train"].extra.get("exported", {}) if "train" in made else {}  # older manifests do not record it
    step = f"; it {exported['note']}" if "note" in exported else ""
    place = f"{context.storage.uri}/{ARTIFACTS}"
    return StageResult(
        stage="publish",
        outcome="succeeded",
        reason="Published",
        message=f"{len(manifest.files)} files, {manifest.size / 1e6:.1f} MB in {place}{also}{step}",
        artifacts=artifacts,
    )


def check_recorded_base(config: RunConfig, made: Manifests) -> None:
    """Raise UserError when the base in a published adapter's card is not the one that it was trained on.

    Merging has already checked it when a whole model is published too.
    """
    recorded = made["train"].extra.get("base") if config.method == "lora" else None
    if recorded and "merge" not in made:
        from internvl_trainer.model.base_identity import check_base  # imports PyTorch

        check_base(config, recorded)


def remove_checkpoints(context: RunContext) -> None:
    """Delete the checkpoints that a published run no longer needs, as checkpoint.afterSuccess says.

    After the manifest of artifacts/, and before that of this stage: an attempt after a crash comes here again.
    """
    settings = context.config.checkpoint
    keep = 1 if settings.after_success == "keep" else 0
    kept = kept_checkpoints(context.storage, keep, with_best=settings.keep_best)
    for folder in checkpoint_folders(context.storage):
        if folder not in kept:
            discard(context.storage, folder)


def refuse_below_threshold(stages: StageStore) -> None:
    """Raises Rejected when the figures do not meet publishIf, for whoever starts this stage by hand."""
    try:
        if evaluated := stages.result(figures_stage("evaluate", stages.config.evaluation)):
            check_publish_condition(stages, evaluated)
    except Rejected as error:
        raise Rejected(error.result.model_copy(update={"stage": "publish"})) from error

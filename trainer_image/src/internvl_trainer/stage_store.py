"""What an earlier stage of this run left, for the stages that need it."""

from __future__ import annotations

from internvl_api.run_config import RunConfig
from internvl_api.status import StageName

from internvl_trainer.artifacts.fingerprint import fingerprint, stage_folder
from internvl_trainer.artifacts.manifest import Manifest, read_manifest
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.errors import UserError


def finished_training(config: RunConfig, storage: Storage) -> Manifest:
    """The manifest of this run's train stage. Raises UserError when it is not there."""
    return finished_stage("train", config, storage)


def finished_stage(stage: StageName, config: RunConfig, storage: Storage) -> Manifest:
    """The manifest of a stage of this run. Raises UserError when it is not there."""
    manifest = read_manifest(storage, stage_folder(stage))
    if manifest is None or manifest.fingerprint != fingerprint(config, stage):
        raise UserError(
            "StageMissing",
            f"found no finished {stage} stage of this run under {storage.uri}; run `internvl-trainer {stage}` first",
            "spec.output",
        )
    return manifest

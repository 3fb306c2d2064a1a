"""The model that a stage evaluates: the base, or the base with what training made of it."""

from __future__ import annotations

from pathlib import Path

import torch
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName

from internvl_trainer.artifacts.base_model import check_base
from internvl_trainer.artifacts.identity import fingerprint, stage_folder
from internvl_trainer.artifacts.manifest import Manifest, check_sizes, read_manifest
from internvl_trainer.artifacts.sources import fetch_directory
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.distributed import Group
from internvl_trainer.errors import UserError
from internvl_trainer.model.adapter_files import load_trained
from internvl_trainer.model.load import LoadedModel, load_chat_model


def find_trained(stage: StageName, config: RunConfig, storage: Storage) -> Manifest | None:
    """The manifest of what is to be evaluated; None for the base model. Raises UserError when nothing was trained."""
    if stage == "baseline-evaluate":
        return None
    folder = stage_folder("train")
    manifest = read_manifest(storage, folder)
    if manifest is None or manifest.fingerprint != fingerprint(config):
        raise UserError(
            "StageMissing",
            f"found no finished train stage of this run under {storage.uri}; run `internvl-trainer train` first",
            "spec.output",
        )
    check_sizes(storage, folder, manifest)
    return manifest


def load_evaluated(config: RunConfig, storage: Storage, trained: Manifest | None, group: Group) -> LoadedModel:
    """On the group's device, ready to answer.

    Raises:
        UserError: the base is not the one that was trained on, or a file is missing or damaged.
    """
    kind = None if trained is None else trained.extra["kind"]
    made = f"{storage.uri}/{stage_folder('train')}/{kind}"
    if kind == "model":
        return _ready(_load(config, fetch_directory(made, field="spec.output")), group)
    base = fetch_directory(config.model.source, field="spec.model.source")
    if trained is not None and group.local_rank == 0:
        check_base(base, config.model.source, trained)
    loaded = _load(config, base)
    if trained is not None:
        load_trained(loaded.model, fetch_directory(made, field="spec.output"))
    return _ready(loaded, group)


def _load(config: RunConfig, directory: Path) -> LoadedModel:
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return load_chat_model(directory, dtype=dtype, image_size=config.image.tile_size)


def _ready(loaded: LoadedModel, group: Group) -> LoadedModel:
    loaded.model.to(group.device).eval()
    return loaded

"""The model that a stage evaluates: the base, or the base with what training made of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName

from internvl_trainer.artifacts.finished import finished_training
from internvl_trainer.artifacts.identity import stage_folder
from internvl_trainer.artifacts.manifest import Manifest, check_sizes
from internvl_trainer.artifacts.sources import fetch_directory
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.distributed import Group
from internvl_trainer.model.base_identity import check_base
from internvl_trainer.model.load import LoadedModel, load_chat_model
from internvl_trainer.model.trained_weights import load_trained
from internvl_trainer.retrieval.load import LoadedRetrievalModel, load_retrieval_model


def find_trained(stage: StageName, config: RunConfig, storage: Storage) -> Manifest | None:
    """The manifest of what is to be evaluated; None for the base model. Raises UserError when nothing was trained."""
    if stage == "baseline-evaluate":
        return None
    manifest = finished_training(config, storage)
    check_sizes(storage, stage_folder("train"), manifest)
    return manifest


@dataclass(frozen=True)
class Evaluated:
    """A model on the group's device, ready to answer, and the folder of its tokenizer."""

    loaded: LoadedModel | LoadedRetrievalModel
    directory: Path


def load_evaluated(config: RunConfig, storage: Storage, trained: Manifest | None, group: Group) -> Evaluated:
    """The base, or the base with what was trained.

    Raises:
        UserError: the base is not the one that was trained on, or a file is missing or damaged.
    """
    kind = None if trained is None else trained.extra["kind"]
    made = f"{storage.uri}/{stage_folder('train')}/{kind}"
    if kind == "model":
        evaluated = _load(config, fetch_directory(made, field="spec.output"))
    else:
        if trained is not None and group.leads:
            check_base(config, trained.extra["base"])
        evaluated = _load(config, fetch_directory(config.model.source, field="spec.model.source"))
        if trained is not None:
            load_trained(evaluated.loaded.model, fetch_directory(made, field="spec.output"))
    evaluated.loaded.model.to(group.device).eval()
    return evaluated


def _load(config: RunConfig, directory: Path) -> Evaluated:
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    load = load_retrieval_model if config.model.kind == "retrieval" else load_chat_model
    return Evaluated(load(directory, dtype=dtype, image_size=config.image.tile_size), directory)

"""The model that a stage evaluates: the base model, or what was trained from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.manifest import Manifest
from internvl_trainer.artifacts.sources import fetch_directory
from internvl_trainer.model.base_identity import check_base
from internvl_trainer.model.checkpoint_source import open_checkpoint
from internvl_trainer.model.load import LoadedModel, load_chat_model
from internvl_trainer.model.trained_weights import load_trained
from internvl_trainer.retrieval.load import LoadedRetrievalModel, load_retrieval_model, open_retrieval_checkpoint
from internvl_trainer.run_context import GroupContext, RunContext


def find_trained(context: RunContext) -> Manifest | None:
    """The train stage's manifest; None for the base model. Raises UserError when nothing was trained."""
    if context.stage == "baseline-evaluate":
        return None
    manifest = context.stages.require("train")
    context.stages.check_sizes("train", manifest)
    return manifest


@dataclass(frozen=True)
class Evaluated:
    """A model on the group's device, ready to answer, and the folder of its tokenizer."""

    loaded: LoadedModel | LoadedRetrievalModel
    directory: Path


def load_evaluated(context: GroupContext, trained: Manifest | None) -> Evaluated:
    """The base, or the base with what was trained.

    Raises:
        UserError: the base is not the one that was trained on, or a file is missing or damaged.
    """
    config, group = context.config, context.group
    kind = None if trained is None else trained.extra["kind"]
    made = context.stages.uri("train", kind or "")
    if kind == "model":
        evaluated = _load(config, fetch_directory(made, field="spec.output"))
    else:
        if trained is not None and group.leads:
            check_base(config, trained.extra["base"])
        evaluated = _load(config, fetch_directory(config.model.source, field="spec.model.source"))
        if trained is not None:
            open_base = open_retrieval_checkpoint if config.model.kind == "retrieval" else open_checkpoint
            base = open_base(evaluated.directory)
            load_trained(evaluated.loaded.model, fetch_directory(made, field="spec.output"), base)
    evaluated.loaded.model.to(group.device).eval()
    return evaluated


def _load(config: RunConfig, directory: Path) -> Evaluated:
    dtype, size = torch.bfloat16 if config.precision == "bf16" else torch.float32, config.image.tile_size
    if config.model.kind == "retrieval":
        return Evaluated(load_retrieval_model(directory, dtype=dtype, image_size=size), directory)
    resize = config.model.resize_embeddings
    return Evaluated(load_chat_model(directory, dtype=dtype, image_size=size, resize_embeddings=resize), directory)

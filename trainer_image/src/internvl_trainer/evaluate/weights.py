"""The model that a stage evaluates: the base model, what was trained from it, or the base with a given adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from internvl_api.memory.answering import Answering, gpus_of_a_copy, not_possible
from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.manifest import Manifest
from internvl_trainer.artifacts.sources import fetch_directory
from internvl_trainer.distributed import Group
from internvl_trainer.errors import UserError
from internvl_trainer.model.adapter_files import read_adapter
from internvl_trainer.model.base_identity import check_base
from internvl_trainer.model.checkpoint_source import Source, open_checkpoint
from internvl_trainer.model.language_shard import LanguageShard
from internvl_trainer.model.load import LoadedModel, load_chat_model
from internvl_trainer.model.trained_weights import load_trained
from internvl_trainer.retrieval.load import LoadedRetrievalModel, load_retrieval_model, open_retrieval_checkpoint
from internvl_trainer.run_context import GroupContext, RunContext


def find_trained(context: RunContext) -> Manifest | None:
    """The train stage's manifest; None for a model that the run does not train. Raises UserError when it is missing."""
    if context.stage == "baseline-evaluate" or not context.config.trains:
        return None
    manifest = context.stages.require("train")
    context.stages.check_sizes("train", manifest)
    return manifest


@dataclass(frozen=True)
class Evaluated:
    """A model on the group's device, ready to answer, and the folder of its tokenizer."""

    loaded: LoadedModel | LoadedRetrievalModel
    directory: Path

    @property
    def shard(self) -> LanguageShard | None:
        """This process's shard of the language model; None where it holds all of it."""
        return self.loaded.shard if isinstance(self.loaded, LoadedModel) else None


def load_evaluated(context: GroupContext, trained: Manifest | None) -> Evaluated:
    """The base, or the base with what was trained, or with spec.model.adapter.

    Raises:
        UserError: the base is not the one that was trained on, or a file is missing or damaged.
    """
    config, group = context.config, context.group
    if trained is not None and trained.extra["kind"] == "model":
        evaluated = _load(config, fetch_directory(context.stages.uri("train", "model"), field="spec.output"), group)
    else:
        if trained is not None and group.leads:
            check_base(config, trained.extra["base"])
        adapter = _find_adapter(context, trained)
        evaluated = _load(config, fetch_directory(config.model.source, field="spec.model.source"), group, adapter)
        if adapter is not None:
            open_base = open_retrieval_checkpoint if config.model.kind == "retrieval" else open_checkpoint
            load_trained(evaluated.loaded.model, adapter, open_base(evaluated.directory), shard=evaluated.shard)
    evaluated.loaded.model.to(group.device).eval()
    return evaluated


def _find_adapter(context: GroupContext, trained: Manifest | None) -> Path | None:
    """The folder of the adapter to put on the base: the trained one, else the given one; None without either."""
    if trained is not None:
        return fetch_directory(context.stages.uri("train", trained.extra["kind"]), field="spec.output")
    given = context.config.model.adapter
    return None if given is None else fetch_directory(given, field="spec.model.adapter")


def _load(config: RunConfig, directory: Path, group: Group, adapter: Path | None = None) -> Evaluated:
    dtype, size = torch.bfloat16 if config.precision == "bf16" else torch.float32, config.image.tile_size
    if config.model.kind == "retrieval":
        retrieving = load_retrieval_model(directory, dtype=dtype, device=group.device, image_size=size)
        return Evaluated(retrieving, directory)
    splits = adapter is None or not read_adapter(adapter).config.use_dora
    answering = answering_from(open_checkpoint(directory), dtype, splits=splits)
    copy = choose_copy(answering, group.device, config.processes_per_worker)
    neighbours = group.neighbours(copy) if copy > 1 else None
    loaded = load_chat_model(
        directory,
        dtype=dtype,
        device=group.device,
        image_size=size,
        resize_embeddings=config.model.resize_embeddings,
        make_shard=lambda text: LanguageShard(group.rank % copy, copy, text, neighbours) if copy > 1 else None,
    )
    return Evaluated(loaded, directory)


def choose_copy(answering: Answering, device: torch.device, gpus: int) -> int:
    """The processes of a machine that hold one copy of a model together; without a GPU, one.

    Raises:
        UserError: all GPUs of the machine together have too little memory.
    """
    if device.type != "cuda":
        return 1
    memory = torch.cuda.get_device_properties(device).total_memory
    found = gpus_of_a_copy(answering, gpus, memory)
    if found is None:
        raise UserError("EvaluationNotPossible", not_possible(answering, gpus, memory), "spec.evaluation.tasks")
    return found


def answering_from(source: Source, dtype: torch.dtype, *, splits: bool = True) -> Answering:
    """Inputs of the decision to split a checkpoint over GPUs."""
    text = source.config.text_config
    sizes = {True: 0, False: 0}
    for entry in source.entries:
        is_split = ".layers." in entry.name and entry.name.startswith(("language_model.", "model.language_model."))
        sizes[is_split] += entry.nbytes // entry.dtype.itemsize * dtype.itemsize
    return Answering(
        whole=sizes[False],
        split=sizes[True],
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        intermediate=text.intermediate_size,
        splits=splits,
    )

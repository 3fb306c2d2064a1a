"""The base model of a training run: fetched whole, or read at its source where a pod needs only a part of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from internvl_api.quantity import gib
from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.output_layout import stored_checkpoints
from internvl_trainer.artifacts.range_sources import open_ranges
from internvl_trainer.artifacts.ranges import RangesUnsupported, changed
from internvl_trainer.artifacts.sources import fetch_directory, has_directory
from internvl_trainer.distributed import Group
from internvl_trainer.model.adapters import learns, native_name
from internvl_trainer.model.checkpoint_format.files import TensorEntry, list_tensors
from internvl_trainer.model.checkpoint_format.remote import list_remote_tensors, versions_of
from internvl_trainer.model.checkpoint_source import Source, open_checkpoint
from internvl_trainer.model.parameters import list_values
from internvl_trainer.retrieval.load import open_retrieval_checkpoint
from internvl_trainer.run_context import GroupContext
from internvl_trainer.train.components import freeze, weights_dtype
from internvl_trainer.train.optimizer_shards import WEIGHT, local_fragments, trainable_shapes, use_restored_weights

logger = logging.getLogger(__name__)
_FIELD = "spec.model.source"


@dataclass(frozen=True)
class BaseModel:
    """The base model's files.

    Attributes:
        config: of the run.
        directory: with configuration and tokenizer, and the weights where they are fetched.
        entries: the stored tensors, there or at their source.
        resumes: whether a checkpoint should have the trainable weights, so that the base model's are not read.
    """

    config: RunConfig
    directory: Path
    entries: list[TensorEntry]
    resumes: bool

    def open(self) -> Source:
        """The weights, with their names in the native model."""
        if self.config.model.kind == "retrieval":
            return open_retrieval_checkpoint(self.directory, self.config.image.tile_size, self.entries)
        return open_checkpoint(self.directory, self.entries)

    def is_restored(self, name: str) -> bool:
        """Whether a native parameter comes from a checkpoint."""
        return self.resumes and (self.config.model.kind == "retrieval" or learns(name, freeze(self.config)))

    def bytes_to_read(self) -> int:
        """Bytes of the tensors that no checkpoint has."""
        entries = {piece.entry.name: piece.entry for piece in self.open().pieces() if not self.is_restored(piece.name)}
        return sum(entry.nbytes for entry in entries.values())


def fetch_base(context: GroupContext) -> BaseModel:
    """The base model, ready to be loaded. All ranks call it. Raises UserError.

    A pod fetches the whole model, unless its ranks together read less of it at the source.
    """
    config, group, uri = context.config, context.group, context.config.model.source
    stored = group.first(bool(stored_checkpoints(context.storage)) if group.leads else None)
    resumes = stored and config.method == "full"
    remote = _at_source(config, group, resumes)
    if remote is not None and not has_directory(uri, field=_FIELD):
        return remote
    directory = fetch_directory(uri, field=_FIELD)
    return BaseModel(config, directory, list_tensors(directory), resumes)


def use_base_weights(engine: Any, base: BaseModel, group: Group) -> None:
    """Give what learns the base model's weights, where no checkpoint is whole although one was expected.

    All ranks call it, before the first step.
    """
    if group.leads:
        logger.warning("no checkpoint is whole: reading the base model's weights instead")
    shapes = {str(native_name(name)): torch.Size(shape) for name, shape in trainable_shapes(engine).items()}
    values = {each.name: each for each in list_values(base.open(), shapes)}
    for fragment in local_fragments(engine, group.rank):
        found = values[str(native_name(fragment.name))].flat(fragment.start, fragment.start + fragment.length)
        fragment.write(WEIGHT, found.to(weights_dtype(base.config)).float())
    use_restored_weights(engine)


def _at_source(config: RunConfig, group: Group, resumes: bool) -> BaseModel | None:
    """The base model at its source, on all ranks; None on all where a pod needs the whole, or ranges are not given."""
    copies = _copies(config, group)
    if (copies >= 1 and not resumes) or config.model.resize_embeddings:  # a new row is the mean of all others
        return None
    source = open_ranges(config.model.source, field=_FIELD)
    if source is None:
        return None
    directory = fetch_directory(config.model.source, field=_FIELD, weights=False)
    base = None
    try:
        base = BaseModel(config, directory, list_remote_tensors(source, directory), resumes)
        found: dict[str, Any] = {"versions": versions_of(base.entries)}
    except RangesUnsupported as error:
        found = {"problem": str(error)}
    everywhere = group.gather(found)
    if problem := next((each["problem"] for each in everywhere if "problem" in each), None):
        _tell(group, f"each pod downloads the whole base model: {problem}")
        return None
    assert base is not None
    if any(each != found for each in everywhere):
        raise changed(source.uri)
    needed, total = int(copies * base.bytes_to_read()), sum(entry.nbytes for entry in base.entries)
    if needed >= total:
        return None
    _tell(group, f"each pod reads {gib(needed)} of the {gib(total)} of the base model's weights, at their source")
    return base


def _tell(group: Group, message: str) -> None:
    if group.leads:
        logger.info("%s", message)


def _copies(config: RunConfig, group: Group) -> float:
    """How often the ranks of one pod together read a tensor: less than once where parameters are partitioned."""
    here = config.processes_per_worker
    return here / group.world_size if config.training.zero_stage == 3 else here

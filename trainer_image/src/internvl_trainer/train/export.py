"""The trained weights as files: a PEFT adapter, or a model directory in the format of the base."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from internvl_api.run_config import RunConfig
from safetensors.torch import save_file

from internvl_trainer.distributed import Group
from internvl_trainer.model.adapter_base import AdapterBase
from internvl_trainer.model.adapter_files import save_adapter
from internvl_trainer.model.adapters import Adaptable, is_adapter, native_name
from internvl_trainer.model.checkpoint_format.files import TensorEntry, read_tensor
from internvl_trainer.model.checkpoint_format.shards import place_in_file, write_tensors
from internvl_trainer.model.checkpoint_format.tensors import DERIVED
from internvl_trainer.model.checkpoint_source import CONFIG_FILE, KEPT_FOLDER, Source
from internvl_trainer.model.convert_checkpoint import copy_files
from internvl_trainer.model.exported_config import GENERATION_CONFIG, trained_config
from internvl_trainer.model.load import LoadedModel
from internvl_trainer.model.trained_weights import OTHER_WEIGHTS
from internvl_trainer.retrieval.load import LoadedRetrievalModel


def export_adapter(
    engine: Any, model: Adaptable, directory: Path, group: Group, base: AdapterBase | None
) -> Iterator[Path]:
    """Write the adapter and the other trained weights on rank 0, which gets their paths. All ranks iterate over it.

    Rank 0 holds the whole adapter in memory, and one tensor of the other weights at a time.

    Args:
        base: the model that the adapter records, on rank 0.
    """
    learning = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    state = dict(full_tensors(engine, group, lambda _: 0, filter(is_adapter, learning)))
    if group.leads:
        save_adapter(model, directory, state, base)
    others = {name: parameter for name, parameter in learning.items() if not is_adapter(name)}
    if others:
        _write_others(engine, others, directory / OTHER_WEIGHTS, group)
    if group.leads:
        yield from _files(directory)


def _write_others(engine: Any, parameters: Mapping[str, Any], path: Path, group: Group) -> None:
    """Write parameters under their native names on rank 0. All ranks call it."""
    described = {name: _describe(name, parameter, path) for name, parameter in parameters.items()}
    names = sorted(described, key=lambda name: place_in_file(described[name]))
    tensors = (tensor for _, tensor in full_tensors(engine, group, lambda _: 0, names))
    if group.leads:
        write_tensors([described[name] for name in names], tensors, path)
    else:
        deque(tensors, maxlen=0)  # takes part in collecting them


def _describe(name: str, parameter: Any, file: Path) -> TensorEntry:
    """Native name, whole shape and dtype of a parameter; under ZeRO-3 `shape` is that of this rank's part."""
    return TensorEntry(_native(name), file, tuple(getattr(parameter, "ds_shape", parameter.shape)), parameter.dtype)


def export_model(
    engine: Any, loaded: LoadedModel, base: Source, directory: Path, config: RunConfig, group: Group
) -> Iterator[Path]:
    """Write a model directory like the base's: the same shards with new weights, all other files copied.

    All ranks iterate over it, and each writes shards of its own: it gets each complete file and may delete it. One
    shard of each rank is in memory.
    """
    directory.mkdir(parents=True)
    if group.leads:
        if base.is_native:
            loaded.model.native.save_pretrained(directory, state_dict={})  # its configuration, no weights
            (directory / GENERATION_CONFIG).unlink(missing_ok=True)  # a default one; the base's is copied
        copy_files(base.directory, directory)
        if base.upstream_config is not None:
            kept = directory / KEPT_FOLDER if base.is_native else directory
            changed = trained_config(
                base.upstream_config,
                config,
                template=loaded.template,
                image_size=loaded.image_size,
                vocabulary=loaded.vocabulary if config.model.resize_embeddings else None,
            )
            (kept / CONFIG_FILE).write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
        yield from _files(directory)
    yield from _write_weights(engine, base, directory, group)


def export_retrieval_model(
    engine: Any, loaded: LoadedRetrievalModel, base: Source, directory: Path, group: Group
) -> Iterator[Path]:
    """Like export_model, for a retrieval model, whose format is always upstream's."""
    directory.mkdir(parents=True)
    if group.leads:
        copy_files(base.directory, directory)
        (directory / CONFIG_FILE).write_text(json.dumps(loaded.upstream_config, indent=2) + "\n", encoding="utf-8")
        yield from _files(directory)
    yield from _write_weights(engine, base, directory, group)


def full_tensors(
    engine: Any, group: Group, owner: Callable[[str], int], names: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of the parameters that this rank owns, on the CPU. All ranks iterate over it.

    Where parameters are partitioned the ranks go in step: before each one they wait for each other on the group for
    slow work, because a rank may take longer to store a file than a collective of the engine's group may take.

    Args:
        owner: the rank that gets a parameter, by its name.
        names: of the parameters, in the order in which they come; the same on all ranks.
    """
    from internvl_trainer.import_deepspeed import deepspeed

    parameters = dict(engine.module.named_parameters())
    for name in names:
        parameter, is_own = parameters[name], owner(name) == group.rank
        if not hasattr(parameter, "ds_id"):
            if is_own:
                yield name, parameter.detach().cpu()
            continue
        group.barrier()
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.detach().cpu().clone() if is_own else None
        if whole is not None:
            yield name, whole


def _native(name: str) -> str:
    """The native model's name of a parameter that is no adapter's."""
    native = native_name(name)
    assert native is not None, f"{name} is an adapter's and has no name in the native model"
    return native


class _Shards:
    """The weight files of a base model, and which rank writes each: one after the other, in turn."""

    def __init__(self, base: Source, world_size: int) -> None:
        self.entries = {entry.name: entry for entry in base.entries}
        self._files = {piece.name: piece.entry.file.name for piece in base.pieces()}
        names = sorted({entry.file.name for entry in base.entries})
        self._owners = {name: number % world_size for number, name in enumerate(names)}

    def file(self, parameter: str) -> str:
        """The file that has a parameter of the model in training."""
        return self._files[_native(parameter)]

    def owner(self, parameter: str) -> int:
        """The rank that writes a parameter of the model in training."""
        return self._owners[self.file(parameter)]


def _write_weights(engine: Any, base: Source, directory: Path, group: Group) -> Iterator[Path]:
    """Write the weights into files like the base's. All ranks iterate over it, and each gets the files it writes.

    Parameters come file by file, in whatever order the model has them, so a rank collects one file at a time.
    """
    shards = _Shards(base, group.world_size)
    names = sorted((name for name, _ in engine.module.named_parameters()), key=shards.file)
    tensors = full_tensors(engine, group, shards.owner, names)
    return _write_shards(base.to_stored((_native(name), tensor) for name, tensor in tensors), shards, directory)


def _write_shards(tensors: Iterable[tuple[str, torch.Tensor]], shards: _Shards, directory: Path) -> Iterator[Path]:
    """Write each tensor into the file that holds it in the base; yields a file when its last tensor is there."""
    waiting: dict[str, set[str]] = defaultdict(set)
    for entry in shards.entries.values():
        waiting[entry.file.name].add(entry.name)
    collected: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        file = shards.entries[name].file.name
        collected[file][name] = tensor.contiguous()
        waiting[file].discard(name)
        if all(DERIVED.search(left) for left in waiting[file]):
            kept = {name: read_tensor(shards.entries[name]) for name in waiting[file]}
            save_file({**collected.pop(file), **kept}, directory / file, metadata={"format": "pt"})
            yield directory / file
    if collected:
        raise RuntimeError(f"tensors without a complete shard: {sorted(collected)}")


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())

"""The trained weights as files: a PEFT adapter, or a model directory in the format of the base."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from internvl_api.run_config import RunConfig
from safetensors import safe_open
from safetensors.torch import save_file

from internvl_trainer.distributed import Group
from internvl_trainer.model.adapter_base import AdapterBase
from internvl_trainer.model.adapter_files import save_adapter
from internvl_trainer.model.adapters import Adaptable, native_name
from internvl_trainer.model.checkpoint_format import to_upstream
from internvl_trainer.model.checkpoint_format.files import list_tensors
from internvl_trainer.model.checkpoint_format.tensors import DERIVED
from internvl_trainer.model.checkpoint_source import CONFIG_FILE, KEPT_FOLDER
from internvl_trainer.model.convert_checkpoint import copy_files
from internvl_trainer.model.exported_config import trained_config
from internvl_trainer.model.load import LoadedModel
from internvl_trainer.model.trained_weights import OTHER_WEIGHTS
from internvl_trainer.retrieval.load import LoadedRetrievalModel


def export_adapter(
    engine: Any, model: Adaptable, directory: Path, group: Group, base: AdapterBase | None
) -> Iterator[Path]:
    """Write the adapter and the other trained weights; yields files on rank 0. All ranks iterate over it.

    Args:
        base: the model that the adapter records, on rank 0.
    """
    state = dict(full_tensors(engine, group, only_trainable=True))
    if not group.leads:
        return
    save_adapter(model, directory, state, base)
    if others := dict(_native_names(state.items())):
        save_file(others, directory / OTHER_WEIGHTS, metadata={"format": "pt"})
    yield from _files(directory)


def export_model(
    engine: Any, loaded: LoadedModel, base: Path, directory: Path, config: RunConfig, group: Group
) -> Iterator[Path]:
    """Write a model directory like the base's: the same shards with new weights, all other files copied.

    All ranks iterate over it; rank 0 gets each complete file and may delete it. About one shard is in memory.
    """
    tensors = _native_names(full_tensors(engine, group, only_trainable=False))
    if not group.leads:
        for _ in tensors:
            pass
        return
    directory.mkdir(parents=True)
    copy_files(base, directory)
    if loaded.upstream_config is not None:
        kept = directory / KEPT_FOLDER if loaded.is_native else directory
        changed = trained_config(
            loaded.upstream_config,
            config,
            template=loaded.template,
            image_size=loaded.image_size,
            vocabulary=loaded.vocabulary if config.model.resize_embeddings else None,
        )
        (kept / CONFIG_FILE).write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
    if loaded.is_native:
        loaded.model.native.save_pretrained(directory, state_dict=dict(tensors))
    else:
        yield from _write_shards(to_upstream(tensors, loaded.architecture), base, directory)
    yield from _files(directory)


def export_retrieval_model(
    engine: Any, loaded: LoadedRetrievalModel, base: Path, directory: Path, group: Group
) -> Iterator[Path]:
    """Like export_model, for a retrieval model, whose format is always upstream's."""
    tensors = full_tensors(engine, group, only_trainable=False)
    if not group.leads:
        for _ in tensors:
            pass
        return
    directory.mkdir(parents=True)
    copy_files(base, directory)
    (directory / CONFIG_FILE).write_text(json.dumps(loaded.upstream_config, indent=2) + "\n", encoding="utf-8")
    yield from _write_shards(to_upstream(tensors, loaded.architecture), base, directory)  # type: ignore[arg-type]
    yield from _files(directory)


def full_tensors(engine: Any, group: Group, *, only_trainable: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of the parameters, on rank 0 and the CPU; the other ranks get empty ones, in step.

    A shared parameter comes once, under its first name.
    """
    import deepspeed

    for name, parameter in engine.module.named_parameters():
        if only_trainable and not parameter.requires_grad:
            continue
        if not hasattr(parameter, "ds_id"):
            yield name, parameter.detach().cpu() if group.leads else torch.empty(0)
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.detach().cpu().clone() if group.leads else torch.empty(0)
        yield name, whole


def _native_names(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under the native model's names, without those of adapters."""
    for name, tensor in tensors:
        if (native := native_name(name)) is not None:
            yield native, tensor


def _write_shards(tensors: Iterable[tuple[str, torch.Tensor]], base: Path, directory: Path) -> Iterator[Path]:
    """Write each tensor into the file that holds it in the base; yields a file when its last tensor is there."""
    files = {entry.name: entry.file.name for entry in list_tensors(base)}
    waiting: dict[str, set[str]] = defaultdict(set)
    for name, file in files.items():
        waiting[file].add(name)
    collected: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        file = files[name]
        collected[file][name] = tensor.contiguous()
        waiting[file].discard(name)
        if all(DERIVED.search(left) for left in waiting[file]):
            kept = _read(base / file, waiting[file])
            save_file({**collected.pop(file), **kept}, directory / file, metadata={"format": "pt"})
            yield directory / file
    if collected:
        raise RuntimeError(f"tensors without a complete shard: {sorted(collected)}")


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _read(path: Path, names: set[str]) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in names}

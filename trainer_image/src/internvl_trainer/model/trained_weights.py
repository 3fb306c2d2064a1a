"""Trained weights, applied to a base model's tensors while they are read, or to a model in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .adapter_base import check_adapter_base
from .adapter_files import Adapter, load_adapter, read_adapter
from .adapters import Adaptable
from .checkpoint_format.files import CheckpointError, StoredTensors
from .checkpoint_format.shards import cut
from .checkpoint_source import Source
from .language_shard import LanguageShard
from .parameters import POSITION_EMBEDDINGS, resize_position_embeddings

OTHER_WEIGHTS = "trained_weights.safetensors"
"""File beside an adapter with weights that learned without one (an unfrozen projector), under native names."""


@dataclass(frozen=True)
class TrainedWeights:
    """A checkpoint_format.shards.Change that turns the base's native tensors into the trained ones.

    Attributes:
        adapter: merged into its weights; None leaves them.
        others: replace the base's tensors.
        positions: number of position embeddings, to which the base's are resized as in training.
    """

    adapter: Adapter | None
    others: Mapping[str, torch.Tensor]
    positions: int

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in self.others:
            tensor = self.others[name].to(tensor.device, tensor.dtype)
        elif name.endswith(POSITION_EMBEDDINGS) and tensor.shape[1] != self.positions:
            tensor = resize_position_embeddings(tensor, self.positions)
        if self.adapter is None or not name.endswith(".weight"):
            return tensor
        return self.adapter.merge(name.removesuffix(".weight"), tensor)

    def without_adapter(self) -> TrainedWeights:
        """The weights under the adapter."""
        return replace(self, adapter=None)

    def check_all_used(self, names: Collection[str], place: str) -> None:
        """Raises CheckpointError when a trained tensor has no tensor in the base."""
        modules = self.adapter.modules if self.adapter else set()
        if unused := ({f"{module}.weight" for module in modules} | set(self.others)) - set(names):
            raise CheckpointError(
                "AdapterMismatch",
                f"{len(unused)} trained tensors have no place in the base model, such as {min(unused)}; is this "
                "adapter for this model?",
                place,
            )


def read_trained_weights(directory: Path, base: Source, *, positions: int) -> TrainedWeights:
    """The weights in an exported adapter's directory, for its base model.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter was trained on another model than `base`.
    """
    others = directory / OTHER_WEIGHTS
    adapter = read_adapter(directory)
    check_adapter_base(directory, base)
    return TrainedWeights(adapter, StoredTensors(others) if others.exists() else {}, positions)


def load_trained(model: Adaptable, directory: str | Path, base: Source, *, shard: LanguageShard | None = None) -> None:
    """Add an exported adapter, and other trained weights if there are any, to its base model, a tensor at a time.

    Args:
        base: the checkpoint that `model` was loaded from.
        shard: of the language model, that this process has; None: it has the whole model.

    Raises:
        CheckpointError: a file is missing or damaged, does not fit the model, or belongs to another one.
    """
    path = Path(directory) / OTHER_WEIGHTS
    if path.exists():
        _replace(model, path, shard)
    load_adapter(model, directory, shard=shard)
    check_adapter_base(Path(directory), base)  # last: the error about a tensor that does not fit is more specific


def _replace(model: Adaptable, path: Path, shard: LanguageShard | None) -> None:
    """Copy a file's tensors over the parameters of the same names."""
    stored, parameters = StoredTensors(path), dict(model.native.named_parameters())
    if unknown := set(stored) - set(parameters):
        message = f"{len(unknown)} tensors have no place in the model, such as {min(unknown)}; is this its adapter?"
        raise CheckpointError("AdapterMismatch", message, str(path))
    with torch.no_grad():
        for name, tensor in stored.items():
            own = cut(tensor, shard.part(name) if shard else None)
            if own.shape != parameters[name].shape:
                found = f"{name} is {list(tensor.shape)}, expected {list(parameters[name].shape)}"
                raise CheckpointError("AdapterMismatch", f"does not fit the model: {found}", str(path))
            parameters[name].copy_(own)

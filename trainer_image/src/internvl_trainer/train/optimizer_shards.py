"""This rank's share of the training state, whatever the ZeRO stage: fp32 weights and Adam moments, by parameter.

ZeRO distributes the flattened parameters over the ranks, so a rank owns at most one range of each parameter. The names
below are DeepSpeed's: a `_hp_mapping` (high precision) on a parameter says which range this rank owns (stages 1, 2);
in stage 3 every parameter is cut into equal parts, the last one padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from internvl_trainer.import_deepspeed import deepspeed

WEIGHT = "weight"
KINDS = (WEIGHT, "exp_avg", "exp_avg_sq")
"""The tensors stored for a parameter, all fp32."""


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of a flattened parameter, owned by this rank."""

    name: str
    start: int
    length: int
    _parameter: Any  # a torch Parameter with DeepSpeed's attributes

    def read(self, kind: str, target: torch.Tensor) -> None:
        """Copy into (length,) fp32 in host memory; from a GPU into pinned memory the copy may end later."""
        target.copy_(self._owned(kind)[: self.length].detach(), non_blocking=True)

    def write(self, kind: str, values: torch.Tensor) -> None:
        """Overwrite with (length,) values."""
        owned = self._owned(kind)
        if not hasattr(self._parameter, "ds_id"):
            owned.data.copy_(values)
            return
        padded = torch.zeros_like(owned)
        padded[: self.length] = values.to(owned.device)
        if kind == WEIGHT:
            deepspeed.utils.safe_set_local_fp32_param(self._parameter, padded)
        else:
            deepspeed.utils.safe_set_local_optimizer_state(self._parameter, padded, kind)

    def _owned(self, kind: str) -> torch.Tensor:
        owned: torch.Tensor
        if not hasattr(self._parameter, "ds_id"):
            owned = self._parameter._hp_mapping.get_hp_fragment(None if kind == WEIGHT else kind)
        elif kind == WEIGHT:
            owned = deepspeed.utils.safe_get_local_fp32_param(self._parameter)
        else:
            owned = deepspeed.utils.safe_get_local_optimizer_state(self._parameter, kind)
        return owned


def trainable_shapes(engine: Any) -> dict[str, list[int]]:
    """Name to full shape of every trainable parameter; a shared one once, under its first name."""
    return {name: list(_shape(parameter)) for name, parameter in _trainable(engine)}


def local_fragments(engine: Any, rank: int) -> list[Fragment]:
    """The fragments that this rank owns, in the order of the parameters."""
    return [fragment for fragment in (_fragment(*item, rank) for item in _trainable(engine)) if fragment is not None]


def begin_optimizer_state(engine: Any) -> None:
    """Create the optimizer's state, as it is before the first step.

    DeepSpeed creates it during the first step, which is too late for a run that resumes, and links only the first
    parameter group.
    """
    optimizer = engine.optimizer
    for partition in _partitions(optimizer):
        on_device = optimizer.optimizer.defaults.get("fused") or optimizer.optimizer.defaults.get("capturable")
        optimizer.optimizer.state[partition] = {
            "step": torch.tensor(0.0, device=partition.device if on_device else "cpu"),
            "exp_avg": torch.zeros_like(partition),
            "exp_avg_sq": torch.zeros_like(partition),
        }
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2
        optimizer._lazy_init_hp_params_optimizer_state()


def set_optimizer_step(engine: Any, step: int) -> None:
    """Set the number of steps that Adam's moments come from."""
    optimizer = engine.optimizer
    for partition in _partitions(optimizer):
        optimizer.optimizer.state[partition]["step"].fill_(float(step))


def use_restored_weights(engine: Any) -> None:
    """Copy the fp32 weights into those the model computes with, on every rank."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):  # stages 1 and 2
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if persistent := optimizer.persistent_parameters:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def _trainable(engine: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def _partitions(optimizer: Any) -> list[torch.Tensor]:
    """The flat fp32 tensors that the optimizer steps."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    partitions: list[torch.Tensor] = next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))
    return partitions


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _fragment(name: str, parameter: Any, rank: int) -> Fragment | None:
    if hasattr(parameter, "ds_id"):
        part = parameter.ds_tensor.numel()
        length = min(part, parameter.ds_numel - rank * part)
        return Fragment(name, rank * part, length, parameter) if length > 0 else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    address = mapping.lp_fragment_address
    return Fragment(name, address.start, address.numel, parameter)

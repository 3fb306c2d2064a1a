"""Parameters of a native model: made without data, checked against a checkpoint and filled from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.initialization import no_init_weights

from .checkpoint_format.files import CheckpointError, TensorEntry, read_tensors, shape_tensors
from .checkpoint_format.tensors import UnknownTensor, match_native
from .checkpoint_source import Source
from .vocabulary import can_grow, grow_rows

POSITION_EMBEDDINGS = "vision_tower.embeddings.position_embeddings"
"""End of the native name of the tensor that depends on the tile size."""


@contextmanager
def empty_parameters(zero3_config: Mapping[str, Any] | None, dtype: torch.dtype) -> Iterator[None]:
    """Modules built in this context have parameters without data: on the meta device, or partitioned (ZeRO-3).

    Args:
        zero3_config: the DeepSpeed config with zero_optimization.stage 3; None otherwise.
    """
    with no_init_weights(), _placement(zero3_config, dtype):
        yield


def _placement(zero3_config: Mapping[str, Any] | None, dtype: torch.dtype) -> Any:
    if zero3_config is None:
        from accelerate import init_empty_weights  # type: ignore[import-untyped]

        return init_empty_weights(include_buffers=False)
    import deepspeed
    import torch._dynamo  # its first import fails inside zero.Init, which patches its classes half-way

    # The dtype is set in the config because CPUs without fp16 make zero.Init ignore its own argument.
    precision = {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    return deepspeed.zero.Init(config_dict_or_path={**zero3_config, **precision})


def fill_parameters(
    native: nn.Module, source: Source, dtype: torch.dtype, *, partitioned: bool, grows: bool = False
) -> None:
    """Fill every parameter from its tensor, after names and shapes are checked without reading data.

    Position embeddings of another tile size are resized.

    Args:
        partitioned: parameters are partitioned (ZeRO-3), and rank 0 alone reads.
        grows: embeddings that lack rows get them.

    Raises:
        CheckpointError: the tensors do not fit the model.
    """
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in native.named_parameters()}
    _check_tensors(source, shapes, grows=grows)
    lead = not partitioned or torch.distributed.get_rank() == 0
    stream = source.rename(read_tensors(source.entries) if lead else shape_tensors(source.entries))
    for name, tensor in stream:
        if name.endswith(POSITION_EMBEDDINGS) and tuple(tensor.shape) != tuple(shapes[name]):
            tensor = resize_position_embeddings(tensor, shapes[name][1])
        elif can_grow(name, tensor, shapes[name]):
            tensor = grow_rows(tensor, shapes[name][0])
        if partitioned:
            _fill_partitioned(native.get_parameter(name), tensor, lead)
        else:
            _assign(native, name, nn.Parameter(tensor.to(dtype, copy=True)))


def check_checkpoint(source: Source, config: InternVLConfig) -> None:
    """Raises CheckpointError unless the directory has exactly the tensors that `config` describes."""
    with torch.device("meta"), no_init_weights():
        native = InternVLForConditionalGeneration(config)
    _check_tensors(source, {name: parameter.shape for name, parameter in native.named_parameters()}, resizable=False)


def resize_position_embeddings(embeddings: torch.Tensor, positions: int) -> torch.Tensor:
    """(1, 1 + n^2, C) to (1, positions, C), bicubic on the square grid in fp32, as upstream; the class token stays."""
    grid = embeddings[:, 1:].float()
    old, new = int(grid.shape[1] ** 0.5), int((positions - 1) ** 0.5)
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(embeddings.dtype)
    return torch.cat([embeddings[:, :1], grid], dim=1)


def _assign(native: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(native.get_submodule(owner), leaf, parameter)


def _fill_partitioned(parameter: nn.Parameter, tensor: torch.Tensor, lead: bool) -> None:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        if lead:
            parameter.copy_(tensor)


def _check_tensors(
    source: Source, shapes: Mapping[str, torch.Size], *, resizable: bool = True, grows: bool = False
) -> None:
    """Raises CheckpointError unless every parameter has a tensor of its shape, and no tensor is left over."""
    missing = set(shapes)
    for entry in source.entries:
        for name, tensor in _renamed(source, entry):
            if name not in shapes:
                raise CheckpointError(
                    "UnknownTensor",
                    f"tensor {entry.name} has no place in the model that config.json describes (as {name}); "
                    f"check that config.json and the weights belong together",
                    str(entry.file),
                )
            missing.discard(name)
            fits = tuple(tensor.shape) == tuple(shapes[name])
            fits = fits or (resizable and _is_resizable(name, tensor, shapes[name]))
            if not fits and not (grows and can_grow(name, tensor, shapes[name])):
                raise _mismatch(entry, name, tensor, shapes[name])
    if missing:
        name = min(missing)
        wanted = match_native(name, source.architecture.kind).upstream_name if not source.is_native else name
        raise CheckpointError(
            "TensorMissing",
            f"tensor {wanted} is in no weight file ({len(missing)} of {len(shapes)} are missing); "
            f"download the weights again",
            str(source.directory),
        )


def _renamed(source: Source, entry: TensorEntry) -> list[tuple[str, torch.Tensor]]:
    try:
        return list(source.rename(shape_tensors([entry])))
    except UnknownTensor as error:
        raise CheckpointError("UnknownTensor", f"{error}; is config.json of this model?", str(entry.file)) from error


def _mismatch(entry: TensorEntry, name: str, tensor: torch.Tensor, shape: torch.Size) -> CheckpointError:
    return CheckpointError(
        "ShapeMismatch",
        f"tensor {entry.name} has shape {list(entry.shape)}; config.json asks for {name} to be {list(shape)}, "
        f"found {list(tensor.shape)}. Check that config.json and the weights belong together",
        str(entry.file),
    )


def _is_resizable(name: str, tensor: torch.Tensor, shape: torch.Size) -> bool:
    return name.endswith(POSITION_EMBEDDINGS) and tensor.ndim == 3 and tensor.shape[2] == shape[2]

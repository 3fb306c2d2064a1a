"""Parameters of a native model: made without data, checked against a checkpoint and filled from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.initialization import no_init_weights

from .checkpoint_format.files import CheckpointError, TensorEntry, shape_tensors
from .checkpoint_format.remote import RemoteEntry, in_order
from .checkpoint_format.shards import Part, Piece
from .checkpoint_format.tensors import UnknownTensor, match_native
from .checkpoint_source import Source
from .vocabulary import can_grow, grow_rows

POSITION_EMBEDDINGS = "vision_tower.embeddings.position_embeddings"
"""End of the native name of the tensor that depends on the tile size."""
CPU = torch.device("cpu")
_READS_AHEAD = 4
"""Of a remote checkpoint; each holds what this process needs of one tensor."""


class Share(Protocol):
    """What one of several processes holds of each parameter."""

    def part(self, name: str) -> Part | None:
        """The part of a native tensor; None is all of it."""


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
    import torch._dynamo  # its first import fails inside zero.Init, which patches its classes half-way

    from internvl_trainer.import_deepspeed import deepspeed

    class PartitionedInit(deepspeed.zero.Init):  # type: ignore[misc]
        """DeepSpeed's own sends each parameter from rank 0 to all, although it has no values yet."""

        def _zero_init_param(self, parameter: Any) -> None:
            self._convert_to_deepspeed_param(parameter)
            parameter.partition()

    # The dtype is set in the config because CPUs without fp16 make zero.Init ignore its own argument.
    precision = {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    return PartitionedInit(config_dict_or_path={**zero3_config, **precision})


def fill_parameters(
    native: nn.Module,
    source: Source,
    dtype: torch.dtype,
    *,
    device: torch.device = CPU,
    partitioned: bool = False,
    grows: bool = False,
    share: Share | None = None,
    whole: nn.Module | None = None,
    is_skipped: Callable[[str], bool] = lambda _: False,
    filled: Callable[[str], None] = lambda _: None,
) -> None:
    """Fill every parameter from its tensor, after names and shapes are checked without reading data.

    Each tensor goes straight from its file to the device. Host memory holds one at most (of remote files a few), and of
    a partitioned parameter only this rank's share, which is all that is read of it.

    Position embeddings of another tile size are resized.

    Args:
        device: of the parameters; partitioned ones have theirs.
        partitioned: parameters are partitioned (ZeRO-3); every rank calls this function.
        grows: embeddings that lack rows get them.
        share: the parts that `native` holds of the parameters of `whole`, which has the checkpoint's shapes.
        is_skipped: the native names of parameters that become zero, with nothing read of them.
        filled: gets each name as soon as its parameter has its value.

    Raises:
        CheckpointError: the tensors do not fit the model.
    """
    shapes = _shapes(native if whole is None else whole)
    _check_tensors(source, shapes, grows=grows)
    found: list[Values] = []
    reads: list[Callable[[], torch.Tensor | None]] = []
    for values in list_values(source, shapes):
        wanted = native.get_parameter(values.name)
        if is_skipped(values.name):
            _fill_with_zeros(native, values.name, wanted, device, dtype, partitioned=partitioned)
            continue
        found.append(values)
        part = share.part(values.name) if share else None
        reads.append(partial(_own_share, wanted, values) if partitioned else partial(values.part, part))
    threads = _READS_AHEAD if any(isinstance(entry, RemoteEntry) for entry in source.entries) else 0
    for values, tensor in zip(found, in_order(reads, threads), strict=True):
        parameter: Any = native.get_parameter(values.name)
        if not partitioned:
            assert tensor is not None
            _assign(native, values.name, nn.Parameter(tensor.to(device, dtype, copy=True)))
        elif parameter.ds_tensor.final_location is not None:  # on a disk, where only DeepSpeed can put it
            _fill_swapped(parameter, values)
        elif tensor is not None:
            with torch.no_grad():
                parameter.ds_tensor[: len(tensor)].copy_(tensor)
        filled(values.name)


def list_values(source: Source, shapes: Mapping[str, torch.Size]) -> Iterator[Values]:
    """The tensor of each native parameter, of which nothing is read yet."""
    for piece in source.pieces():
        if (shape := shapes.get(piece.name)) is not None:  # otherwise a derived buffer
            yield Values(piece, source.architecture, shape)


class Values:
    """A native tensor in a file, cut or changed to the shape that the model wants."""

    def __init__(self, piece: Piece, architecture: Any, shape: torch.Size) -> None:
        self._piece, self._architecture, self._shape = piece, architecture, shape

    @property
    def name(self) -> str:
        """The native name."""
        return self._piece.name

    def part(self, part: Part | None) -> torch.Tensor:
        """The rows or columns of a part; None is the whole tensor, resized or grown to the wanted shape."""
        tensor = self._piece.cut(self._piece.entry.open(), self._architecture, part)
        if part is not None or tuple(tensor.shape) == tuple(self._shape):
            return tensor
        if self._piece.name.endswith(POSITION_EMBEDDINGS):
            return resize_position_embeddings(tensor, self._shape[1])
        return grow_rows(tensor, self._shape[0])

    def flat(self, start: int, end: int) -> torch.Tensor:
        """Elements [start, end) of the flattened tensor."""
        stored = self._piece.entry.open()
        is_changed = self._piece.rule is None and tuple(stored.shape) != tuple(self._shape)
        if is_changed:
            return self.part(None).reshape(-1)[start:end]
        size = max(1, self._shape[1:].numel())
        first = start // size
        rows = self._piece.rows(stored, self._architecture, first, -(-end // size))
        return rows.reshape(-1)[start - first * size : end - first * size]


def _shapes(native: nn.Module) -> dict[str, torch.Size]:
    return {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in native.named_parameters()}


def check_checkpoint(source: Source, config: InternVLConfig) -> None:
    """Raises CheckpointError unless the directory has exactly the tensors that `config` describes."""
    _check_tensors(source, _shapes(whole_model(config)), resizable=False)


def whole_model(config: InternVLConfig) -> InternVLForConditionalGeneration:
    """The native model without data, for its names and shapes."""
    with torch.device("meta"), no_init_weights():
        return InternVLForConditionalGeneration(config)


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


def _own_share(parameter: Any, values: Values) -> torch.Tensor | None:
    """This rank's share of a parameter under ZeRO-3, a range of the flattened tensor; None without one in memory."""
    share = parameter.ds_tensor
    start = parameter.ds_zero_partition_rank * share.ds_numel
    length = min(share.ds_numel, parameter.ds_numel - start)
    return values.flat(start, start + length) if length > 0 and share.final_location is None else None


def _fill_with_zeros(
    native: nn.Module, name: str, parameter: Any, device: torch.device, dtype: torch.dtype, *, partitioned: bool
) -> None:
    if not partitioned:
        _assign(native, name, nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device)))
    elif parameter.ds_tensor.final_location is None:
        with torch.no_grad():
            parameter.ds_tensor.zero_()


def _fill_swapped(parameter: nn.Parameter, values: Values) -> None:
    from internvl_trainer.import_deepspeed import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.copy_(values.part(None))


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

"""Loading holds one tensor in host memory at a time, and a rank reads its own share of each parameter."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from golden import KINDS, checkpoint, load
from internvl_trainer.model.checkpoint_source import open_checkpoint
from internvl_trainer.model.load import load_chat_model
from internvl_trainer.model.parameters import list_values
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")  # stands for a GPU: what is there needs no memory of the host


class HostMemory(TorchDispatchMode):
    """Bytes of tensors on the CPU that exist at a time, as PyTorch makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if place in self._known:  # a view
            return
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def fp32_sizes(model: torch.nn.Module) -> list[int]:
    return [4 * parameter.numel() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_host_memory_holds_one_tensor_at_a_time(kind: str) -> None:
    with HostMemory() as host:
        loaded = load_chat_model(checkpoint(kind), dtype=torch.float32, device=META)
    sizes = fp32_sizes(loaded.model)
    fused = max(4 * entry.nbytes // entry.dtype.itemsize for entry in open_checkpoint(checkpoint(kind)).entries)
    assert all(parameter.is_meta for parameter in loaded.model.parameters())
    assert host.peak <= 2 * fused < sum(sizes) / 3  # a tensor, and the next one's mapping


@pytest.mark.parametrize("kind", KINDS)
def test_shares_together_are_the_whole_tensor(kind: str) -> None:
    """Also of a tensor that is a part of a fused one, and of one that is resized for other tiles."""
    native = load(kind, image_size=84).model.native
    source = open_checkpoint(checkpoint(kind))
    shapes = {name: parameter.shape for name, parameter in native.named_parameters()}
    seen = set()
    for values in list_values(source, shapes):
        size = -(-shapes[values.name].numel() // 3)
        shares = [values.flat(start, start + size) for start in (0, size, 2 * size)]
        assert torch.equal(torch.cat(shares), native.get_parameter(values.name).flatten()), values.name
        seen.add(values.name)
    assert seen == set(shapes)

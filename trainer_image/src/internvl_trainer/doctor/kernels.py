"""Attention kernels on small inputs, each compared with PyTorch's attention in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from internvl_trainer.doctor.machine import Kernel
from internvl_trainer.model.attention import Kernel as Attend
from internvl_trainer.model.attention import (
    Rows,
    attend_each_row,
    attend_flash_attn,
    attend_varlen,
    kernel_error,
)
from internvl_trainer.signals import StopRequested

_LENGTHS = (96, 160)  # tokens of the two rows
_HEADS = (4, 4)  # of queries and keys; not every kernel takes fewer keys
# How a kernel says that this machine does not have it.
_ABSENT = (ImportError, NotImplementedError)
_NO_KERNEL = (
    "no available kernel",
    "no viable backend",
    "not available",
    "only supports",
    "is not supported",
    "not implemented for",
)


def measure_kernels(devices: Sequence[torch.device]) -> tuple[Kernel, ...]:
    """The kernels that attention may use, each run once in bf16 on each device, forward and backward."""
    ways: dict[str, Attend] = {
        "sdpa flash": partial(_attend_sdpa, SDPBackend.FLASH_ATTENTION),
        "sdpa efficient": partial(_attend_sdpa, SDPBackend.EFFICIENT_ATTENTION),
        "sdpa cudnn": partial(_attend_sdpa, SDPBackend.CUDNN_ATTENTION),
        "varlen": _attend_varlen,
        "flash-attn": attend_flash_attn,
    }
    return tuple(
        replace(run_kernel(name, partial(_error_on, device, way)), device="" if device.type == "cpu" else str(device))
        for name, way in ways.items()
        for device in devices
    )


def run_kernel(name: str, measure: Callable[[], float]) -> Kernel:
    """A kernel's error, or why it did not run."""
    try:
        return Kernel(name, error=measure())
    except StopRequested:
        raise
    except Exception as error:  # noqa: BLE001  whatever a kernel raises is its finding
        line = (str(error).strip().splitlines() or [""])[0].partition(". ")[0][:120]
        absent = isinstance(error, _ABSENT) or any(text in str(error).lower() for text in _NO_KERNEL)
        return Kernel(name, missing=line) if absent else Kernel(name, failure=f"{type(error).__name__}: {line}")


def _error_on(device: torch.device, way: Attend) -> float:
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return kernel_error(way, device, lengths=_LENGTHS, heads=_HEADS)


def _attend_sdpa(
    backend: SDPBackend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """The result of one of PyTorch's kernels; float64 is the reference, and goes its usual way."""
    with sdpa_kernel(backend):
        return attend_each_row(query, key, value, rows, scale, window)


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scale: float | None, window: int | None
) -> torch.Tensor:
    if query.device.type != "cuda":
        raise NotImplementedError("needs a GPU")
    return attend_varlen(query, key, value, rows, scale, window)

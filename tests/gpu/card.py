"""The device: what it can compute, its memory, and how often the host waits for it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# Dense bf16, operations a second. Sources: NVIDIA's data sheets of the A100 (2021), H100 (2023) and H200 (2024); those
# of the H100 and H200 give twice as much, with sparsity.
PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
# Calls in which the host waits for a GPU. The profiler itself ends with cudaDeviceSynchronize.
_WAITS_ON_GPU = ("cudaStreamSynchronize", "cudaEventSynchronize")
_WAITS_ON_CPU = ("aten::_local_scalar_dense",)  # what would wait on a GPU


def peak_flops(name: str) -> float | None:
    """Operations a second that the maker states for this card; None for another one."""
    return next((peak for start, peak in PEAKS.items() if name.startswith(start)), None)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, including the work that it queues on the device."""
    synchronize(device)
    began = time.monotonic()
    call()
    synchronize(device)
    return time.monotonic() - began


def matmul_flops(device: torch.device, size: int = 8192, rounds: int = 50) -> float:
    """Operations a second of products of two square bf16 matrices."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        for _ in range(rounds):
            left @ right

    seconds_of(multiply, device)
    return 2 * size**3 * rounds / seconds_of(multiply, device)


def begin_peak(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory in use on the card since `begin_peak`: torch's, and what CUDA takes for itself; None on the CPU.

    No other process may use the card.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device) + torch.cuda.max_memory_reserved(device)


def count_waits(call: Callable[[], object], device: torch.device) -> int:
    """How often the host waits for the device during a call, by torch's profiler."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        call()
    counts = Counter(event.name for event in profiler.events())
    return sum(counts[name] for name in (_WAITS_ON_GPU if on_gpu else _WAITS_ON_CPU))

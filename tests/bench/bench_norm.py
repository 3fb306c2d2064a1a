"""Measures transformers' RMS norm beside PyTorch's fused one, by turns on one thread. It asserts no limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

TOKENS, HIDDEN, ROUNDS = 1024, 896, 30  # InternVL3-1B's hidden size

Norm = Callable[[torch.Tensor], torch.Tensor]


def bench_norm() -> None:
    """Differing results, memory kept for the backward pass, and CPU time forward and backward, in fp32 and bf16."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = Table(title=f"RMS norm of {TOKENS:,} x {HIDDEN} numbers; fastest of {ROUNDS} calls")
    for column in ("dtype", "norm", "results that differ", "saved for backward, MB", "ms"):
        table.add_column(column)
    for dtype in (torch.float32, torch.bfloat16):
        hidden, norms = _inputs(dtype)
        expected, seconds = norms["transformers"](hidden), _fastest(hidden, norms)
        for name, norm in norms.items():
            differ = (norm(hidden) != expected).double().mean().item()
            kept = f"{_kept(hidden, norm) / 1e6:.1f}"
            table.add_row(str(dtype), name, f"{differ:.1%}", kept, f"{1e3 * seconds[name]:.1f}")
    Console().print(table)
    torch.set_num_threads(threads)


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, Norm]]:
    torch.manual_seed(0)
    own = Qwen2RMSNorm(HIDDEN)
    own.weight.data = 1 + 0.1 * torch.randn(HIDDEN)
    own = own.to(dtype)
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    fused = partial(functional.rms_norm, normalized_shape=(HIDDEN,), weight=own.weight, eps=own.variance_epsilon)
    return hidden, {"transformers": own, "fused": fused}


def _kept(hidden: torch.Tensor, norm: Norm) -> int:
    """Bytes kept for the backward pass."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(hidden)
    return sum(sizes.values())


def _fastest(hidden: torch.Tensor, norms: dict[str, Norm]) -> dict[str, float]:
    """CPU seconds of each norm's fastest call, forward and backward."""
    fastest = dict.fromkeys(norms, float("inf"))
    for _ in range(ROUNDS):
        for name, norm in norms.items():
            began = time.process_time()
            norm(hidden).sum().backward()
            fastest[name] = min(fastest[name], time.process_time() - began)
    return fastest

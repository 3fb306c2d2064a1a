"""The bus bandwidth of an all-reduce over the ranks of a process group that has been joined."""

from __future__ import annotations

import time

_ROUNDS = 5


class WrongSum(RuntimeError):
    """An all-reduce whose result is not the sum."""


def timed_all_reduce(device: str, rank: int, processes: int, megabytes: int) -> float:
    """Bytes per second of bus bandwidth in the default group.

    Raises WrongSum after the last reduction: the group can be used again.

    Args:
        device: torch's name of it, such as `cpu` or `cuda:0`.
        megabytes: MiB that each rank reduces.
    """
    import torch
    import torch.distributed as dist

    data = torch.full((megabytes * 2**18,), float(rank + 1), device=device)  # float32
    dist.all_reduce(data)
    expected = processes * (processes + 1) / 2
    wrong = int((data != expected).sum())
    _wait(device)
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        dist.all_reduce(data)
        data.fill_(1.0)  # the sums would overflow
    _wait(device)
    seconds = (time.perf_counter() - started) / _ROUNDS
    if wrong:
        raise WrongSum(f"wrong sum: {wrong} of {data.numel()} numbers are not {expected:g}")
    # Bus bandwidth as nccl-tests defines it: each byte crosses 2 (n - 1) / n times.
    return 2 * (processes - 1) / processes * data.numel() * data.element_size() / seconds


def _wait(device: str) -> None:
    """Wait until a GPU has finished its collectives, which return earlier."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)

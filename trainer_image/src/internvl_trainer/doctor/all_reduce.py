"""An all-reduce over processes of this machine: its bus bandwidth, and whether the sum is right.

As a program: `python -m internvl_trainer.doctor.all_reduce RANK PROCESSES DEVICE MEGABYTES FILE`; rank 0 prints the
bytes per second.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from internvl_trainer.all_reduce import timed_all_reduce
from internvl_trainer.doctor.machine import AllReduce, Problem

_SECONDS = 120.0  # for all processes together, with importing torch


def measure_all_reduce(device: str, processes: int, megabytes: int) -> AllReduce | Problem | None:
    """The bandwidth between `processes` processes; None for one process.

    Args:
        device: `cuda` for one process a GPU over NCCL, `cpu` for gloo.
    """
    if processes < 2:
        return None
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder, ExitStack() as stack:
        meeting = Path(folder) / "meeting"
        command = [sys.executable, "-m", "internvl_trainer.doctor.all_reduce"]
        started = []
        for rank in range(processes):
            words = [str(rank), str(processes), device, str(megabytes), str(meeting)]
            process = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        return _result("nccl" if device == "cuda" else "gloo", started)


def _result(backend: str, processes: list[subprocess.Popen[str]]) -> AllReduce | Problem:
    limit = time.monotonic() + _SECONDS
    printed = []
    for rank, process in enumerate(processes):
        try:
            output, errors = process.communicate(timeout=max(0.1, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            return Problem(f"{backend}: process {rank} of {len(processes)} did not finish within {_SECONDS:.0f} s")
        if process.returncode:
            last = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1][:200]
            return Problem(f"{backend}: process {rank} of {len(processes)}: {last}")
        printed.append(output)
    return AllReduce(backend, len(processes), float(printed[0]))


def reduce_here(rank: int, processes: int, device: str, megabytes: int, meeting: str) -> float:
    """Join the others and reduce; bytes per second of bus bandwidth. Raises WrongSum."""
    import torch
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=_SECONDS / 2),
    )
    try:
        return timed_all_reduce(device, rank, processes, megabytes)
    finally:
        dist.destroy_process_group()


def main(words: list[str]) -> None:
    """The program of one process."""
    rank, processes, device, megabytes, meeting = words
    rate = reduce_here(int(rank), int(processes), device, int(megabytes), meeting)
    if rank == "0":
        print(rate)


if __name__ == "__main__":
    main(sys.argv[1:])

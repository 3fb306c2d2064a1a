"""Real processes on this machine that find each other: for what is to be the same on one rank and on several."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ivft_cluster.ports import free_ports


def run_on_two_ranks(worker: Path, output: Path, runs: Sequence[str]) -> Path:
    """Start `worker OUTPUT RUN…` as ranks 0 and 1, wait for both, and give back `output`, where their results are."""
    return run_on_ranks(2, worker, output, runs)


def run_on_ranks(ranks: int, worker: Path, output: Path, runs: Sequence[str]) -> Path:
    """The same on so many ranks."""
    (port,) = free_ports(1)
    world = {"WORLD_SIZE": str(ranks), "PET_NPROC_PER_NODE": str(ranks)}
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", **world}
    workers = [
        subprocess.Popen(
            [sys.executable, str(worker), str(output), *runs],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        logs = [process.communicate(timeout=600)[0] for process in workers]
    finally:
        for process in workers:
            process.kill()
    assert [process.returncode for process in workers] == [0] * ranks, "\n".join(log[-3000:] for log in logs)
    return output

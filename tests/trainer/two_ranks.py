"""Two real processes on this machine that find each other: for what is to be the same on one rank and on two."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ivft_cluster.ports import free_ports


def run_on_two_ranks(worker: Path, output: Path, runs: Sequence[str]) -> Path:
    """Start `worker OUTPUT RUN…` as ranks 0 and 1, wait for both, and give back `output`, where their results are."""
    (port,) = free_ports(1)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(worker), str(output), *runs],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        logs = [process.communicate(timeout=600)[0] for process in workers]
    finally:
        for process in workers:
            process.kill()
    assert [process.returncode for process in workers] == [0, 0], "\n".join(log[-3000:] for log in logs)
    return output

"""Measures the time of a step while a checkpoint is stored at 50 MB/s, and without one. It asserts no limits."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from internvl_trainer.artifacts.storage import FolderStorage
from internvl_trainer.train import checkpoint as checkpoint_module
from internvl_trainer.train.checkpoint import Checkpoints
from internvl_trainer.train.optimizer_shards import KINDS
from rich.console import Console
from rich.table import Table
from trainer.contexts import Alone

PARAMETERS = 50_000_000  # of one rank: 600 MB of state, stored in two files
BYTES_A_SECOND = 50e6
ROUNDS, STEPS = 4, 8  # of each kind in a round, in turns, so that other work on the machine slows both alike


class Throttled(FolderStorage):
    """A folder behind a connection of BYTES_A_SECOND."""

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        time.sleep(path.stat().st_size / BYTES_A_SECOND)
        super().upload(path, key, sha256=sha256)


class Part:
    """A range of PARAMETERS numbers, as optimizer_shards.Fragment."""

    name, start, length = "weights", 0, PARAMETERS

    def __init__(self) -> None:
        self.state = {kind: torch.rand(PARAMETERS) for kind in KINDS}

    def read(self, kind: str, target: torch.Tensor) -> None:
        target.copy_(self.state[kind])


def bench_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one thread on the CPU: about a fifth of a second of matrix products, and the meeting of the ranks."""
    torch.set_num_threads(1)
    part = Part()
    monkeypatch.setattr(checkpoint_module, "local_fragments", lambda *_: [part])
    monkeypatch.setattr(checkpoint_module, "trainable_shapes", lambda _: {"weights": [PARAMETERS]})
    engine: Any = SimpleNamespace()
    matrix = torch.rand(1500, 1500)
    with tempfile.TemporaryDirectory() as folder:
        storage = Throttled(Path(folder), field="spec.output")
        checkpoints = Checkpoints(storage, Alone(), fingerprint="f", keep=1)

        def steps(count: int) -> list[float]:
            taken = []
            for _ in range(count):
                began = time.monotonic()
                checkpoints.advance(checkpoints.ready())
                matrix @ matrix @ matrix
                taken.append(time.monotonic() - began)
            return taken

        without, during, stalls, stored = [], [], [], []
        for number in range(ROUNDS):
            without += steps(STEPS)
            began = time.monotonic()
            checkpoints.save(engine, number, {})
            stalls.append(time.monotonic() - began)
            during += steps(STEPS)
            assert checkpoints.in_flight is not None, "the steps were taken while it was in flight"
            saved = checkpoints.finish()
            assert saved is not None
            stored.append(saved.store_seconds)
    table = Table(title=f"A checkpoint of {PARAMETERS * 12 / 1e6:.0f} MB at {BYTES_A_SECOND / 1e6:.0f} MB/s, one rank")
    for column in ("median step without, s", "with one in flight, s", "ratio", "stall, s", "stored after, s"):
        table.add_column(column)
    median, slowed = statistics.median(without), statistics.median(during)
    stall = f"first {stalls[0]:.2f}, then {statistics.median(stalls[1:]):.2f}"
    cells = f"{median:.3f}", f"{slowed:.3f}", f"{slowed / median:.3f}", stall, f"{statistics.median(stored):.1f}"
    table.add_row(*cells)
    Console().print(table)

"""Training of a few numbers over ranks that are threads: the real checkpoints, without an engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.distributed import Group
from internvl_trainer.train.checkpoint import Checkpoints
from internvl_trainer.train.optimizer_shards import KINDS

STEPS = 6
SAVED = (2, 4)
SHAPES = {"embedding": 37, "norm": 5}
"""Elements of each parameter, which the ranks own in equal parts."""


class Killed(BaseException):
    """The process ends here."""


class ToyPart:
    """The range of a parameter that a rank owns, as optimizer_shards.Fragment."""

    def __init__(self, name: str, start: int, length: int) -> None:
        self.name, self.start, self.length = name, start, length
        self.state = {kind: torch.full((length,), float(number)) for number, kind in enumerate(KINDS)}

    def read(self, kind: str, target: torch.Tensor) -> None:
        target.copy_(self.state[kind])

    def write(self, kind: str, values: torch.Tensor) -> None:
        self.state[kind].copy_(values)


class ToyEngine:
    """A rank's state; a step changes it as a function of the step and of each number's place."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.parts = []
        for name, size in SHAPES.items():
            start, stop = size * rank // world_size, size * (rank + 1) // world_size
            self.parts.append(ToyPart(name, start, stop - start))
        self.step = 0

    def take_step(self) -> None:
        self.step += 1
        for part in self.parts:
            places = torch.arange(part.start, part.start + part.length)
            for number, kind in enumerate(KINDS):
                part.state[kind] = part.state[kind] * 0.9 + torch.sin(places * self.step + number)

    def values(self) -> dict[str, list[float]]:
        return {f"{kind}/{part.name}": part.state[kind].tolist() for part in self.parts for kind in KINDS}


class Ranks:
    """Collective operations between threads; one that ends early ends the others' waiting too."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.values: list[Any] = [None] * world_size


class ThreadGroup(Group):
    """One rank of Ranks."""

    def __init__(self, rank: int, ranks: Ranks) -> None:
        super().__init__(rank, len(ranks.values), 0, torch.device("cpu"), None)
        self._ranks = ranks

    def gather(self, value: Any) -> list[Any]:
        self._ranks.values[self.rank] = json.loads(json.dumps(value))
        self._ranks.barrier.wait()
        values = list(self._ranks.values)
        self._ranks.barrier.wait()
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(each) for each in zip(*self.gather(list(values)), strict=True)]


def train(storage: Storage, group: Group, folder: Path, *, keep: int = 2, **options: Any) -> ToyEngine:
    """Resume, take the steps that are left, save after each of SAVED; the engine at the end."""
    engine = ToyEngine(group.rank, group.world_size)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(storage, group, fingerprint="f", keep=keep, **options)
    engine.step = checkpoints.restore(engine, folder, total_steps=STEPS)
    journal = folder / "metrics.jsonl"
    while engine.step < STEPS:
        [ready] = group.sum([checkpoints.ready()])
        checkpoints.advance(ready)
        engine.take_step()
        journal.write_text(f"{engine.step}\n")
        if engine.step in SAVED:
            checkpoints.save(engine, engine.step, {"metrics.jsonl": journal} if group.leads else {})
    checkpoints.finish()
    return engine


def together(world_size: int, work: Callable[[Group], Any]) -> list[Any]:
    """What each rank returns, or the error that ended it."""
    ranks = Ranks(world_size)

    def run(rank: int) -> Any:
        try:
            return work(ThreadGroup(rank, ranks))
        except (Exception, Killed) as error:  # noqa: BLE001 - the others must not wait for it
            ranks.barrier.abort()
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def state_of(engines: Sequence[ToyEngine]) -> dict[str, list[float]]:
    """The whole state, from every rank's part."""
    whole: dict[str, list[float]] = {}
    for engine in engines:
        for name, values in engine.values().items():
            whole.setdefault(name, []).extend(values)
    return whole

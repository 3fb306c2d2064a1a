"""What is to be done to which run, and when: drawn from a seed, before anything runs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

STEPS, EVERY_STEPS = 30, 5
LATEST_STEP = 18  # so that there is something left to disturb when the observer hears of the step
RENDEZVOUS = 0  # the step of a group whose pods run and have not met yet
RUN_NAME = "chaos-{:02d}"

Stage = Literal["train", "publish"]


@dataclass(frozen=True)
class Kind:
    """A disturbance: whom it hits, and what may be said of the attempts that it ends (docs/runbook.md)."""

    title: str
    hits_all: bool = True  # every run in flight; else only the one it was meant for
    reasons: frozenset[str] = frozenset()

    @property
    def harmless(self) -> bool:
        """Whether no attempt may end because of it."""
        return not self.reasons


_LOST = frozenset({"WorkerLost", "WorkerDeleted", "NodeLost"})
_AWAY = frozenset({"StorageUnavailable"})
WORKER_DELETED = Kind("worker deleted", hits_all=False, reasons=frozenset({"WorkerLost", "WorkerDeleted"}))
TRAINER_KILLED = Kind("trainer killed", hits_all=False, reasons=frozenset({"WorkerKilled", "ProcessKilled"}))
NODE_RESTARTED = Kind("node restarted", reasons=_LOST | {"PeerLost"})
NODE_LOST = Kind("node lost", reasons=_LOST | {"PeerLost"})
NODES_CUT = Kind("nodes cut apart", reasons=frozenset({"PeerLost", "RendezvousTimeout"}))
STORAGE_STOPPED = Kind("storage stopped", reasons=_AWAY)
API_SERVER_RESTARTED = Kind("API server restarted")
OPERATOR_KILLED = Kind("operator killed")
KINDS = (
    WORKER_DELETED,
    TRAINER_KILLED,
    NODE_RESTARTED,
    NODE_LOST,
    NODES_CUT,
    STORAGE_STOPPED,
    API_SERVER_RESTARTED,
    OPERATOR_KILLED,
)


@dataclass(frozen=True)
class Planned:
    """To `run`, as soon as its `stage` is seen to run, and training to have taken `step` steps."""

    run: str
    kind: Kind
    stage: Stage
    step: int
    rank: int  # of the worker, or of the one whose node is meant

    @property
    def moment(self) -> str:
        """For people."""
        if self.stage == "publish":
            return "publish"
        return f"step {self.step}" if self.step != RENDEZVOUS else "rendezvous"


def plan(seed: int, runs: int) -> list[Planned]:
    """One disturbance for each run, the kinds in rounds: each occurs once before any occurs again."""
    chance = random.Random(seed)
    drawn: list[Planned] = []
    while len(drawn) < runs:
        for kind in chance.sample(KINDS, len(KINDS)):
            drawn.append(_draw(chance, RUN_NAME.format(len(drawn) + 1), kind))
    return drawn[:runs]


def _draw(chance: random.Random, run: str, kind: Kind) -> Planned:
    if chance.random() < 1 / 6:
        return Planned(run, kind, "publish", STEPS, rank=0)
    step = RENDEZVOUS if chance.random() < 1 / 4 else chance.randint(1, LATEST_STEP)
    return Planned(run, kind, "train", step, rank=chance.randrange(2))

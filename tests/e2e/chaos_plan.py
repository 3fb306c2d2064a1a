"""The chaos plan: which disturbance hits which run, and when. A seed draws it before any run starts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

STEPS, EVERY_STEPS = 30, 5
LATEST_STEP = 18  # leaves steps to disturb after the observer sees this one
RENDEZVOUS = 0  # the step of a group whose pods run but have not connected yet
RUN_NAME = "chaos-{:02d}"

Stage = Literal["train", "publish"]


@dataclass(frozen=True)
class Kind:
    """A disturbance: the runs it hits, and the allowed reasons for the attempts that it ends (docs/runbook.md)."""

    title: str
    hits_all: bool = True  # hits every active run; else only its own
    reasons: frozenset[str] = frozenset()

    @property
    def harmless(self) -> bool:
        """Whether it must not end any attempt."""
        return not self.reasons


_LOST = frozenset({"WorkerLost", "WorkerDeleted", "NodeLost"})
_AWAY = frozenset({"StorageUnavailable"})
WORKER_DELETED = Kind("worker deleted", hits_all=False, reasons=frozenset({"WorkerLost", "WorkerDeleted"}))
TRAINER_KILLED = Kind("trainer killed", hits_all=False, reasons=frozenset({"WorkerKilled", "ProcessKilled"}))
# The other node may have no room for a run that avoids a node after two failures.
_NODE_AWAY = _LOST | {"PeerLost", "AvoidedNodesAllowed"}
NODE_RESTARTED = Kind("node restarted", reasons=_NODE_AWAY)
NODE_LOST = Kind("node lost", reasons=_NODE_AWAY)
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
    """A disturbance of `run`, once its `stage` runs and training has done `step` steps."""

    run: str
    kind: Kind
    stage: Stage
    step: int
    rank: int  # of the worker to disturb, or whose node to disturb

    @property
    def moment(self) -> str:
        """Moment as text."""
        if self.stage == "publish":
            return "publish"
        return f"step {self.step}" if self.step != RENDEZVOUS else "rendezvous"


def plan(seed: int, runs: int) -> list[Planned]:
    """One disturbance for each run; every kind occurs once before any kind occurs again."""
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

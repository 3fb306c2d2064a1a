"""Checks whether a disturbed run ended as it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from e2e.chaos_plan import API_SERVER_RESTARTED, STEPS, TRAINER_KILLED, WORKER_DELETED, Kind
from internvl_api.status import InternVLFineTuneStatus
from ivft_demo.results import Loss

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Product:
    """Files of a run in object storage."""

    curve: list[Loss]
    adapter: dict[str, str]  # path -> sha256
    checkpoints: dict[str, bool] = field(default_factory=dict)  # folder -> whether it is complete

    def distance(self, other: Product) -> float:
        """Largest difference of losses; infinite where the steps differ."""
        if [each.step for each in self.curve] != [each.step for each in other.curve]:
            return float("inf")
        return max(abs(mine.loss - theirs.loss) for mine, theirs in zip(self.curve, other.curve, strict=True))


@dataclass(frozen=True)
class Ending:
    """How a run ended. `reasons`: of every attempt except the last; `kinds`: the disturbances that affected it."""

    status: InternVLFineTuneStatus
    reasons: Sequence[str]
    kinds: Sequence[Kind]


def complaints(ending: Ending) -> list[str]:
    """Problems with the end of a run; empty when it ended as it should."""
    status, restarts = ending.status, ending.status.restarts
    if status.phase != "Succeeded":
        words = [f"{c.reason}: {c.message}" for c in status.conditions if (c.type, c.status) == ("Failed", "True")]
        return [f"it is {status.phase} {words}"]
    allowed = frozenset[str]().union(*(kind.reasons for kind in ending.kinds))
    found = [f"reason {reason}, which no disturbance explains" for reason in set(ending.reasons) - allowed]
    ended = status.attempt - 1
    # after a restart of the API server, its history may no longer have a change that the observer missed
    if len(ending.reasons) > ended or (len(ending.reasons) < ended and API_SERVER_RESTARTED not in ending.kinds):
        found.append(f"{ended} attempts ended, and {len(ending.reasons)} were observed")
    if restarts.user not in _user_restarts(ending.kinds):
        found.append(f"{restarts.user} restarts count against the user")
    if (step := status.progress.step if status.progress else None) != STEPS:
        found.append(f"its status ends at step {step}")
    if WORKER_DELETED in ending.kinds and not restarts.infrastructure:
        found.append("a worker was deleted, but no infrastructure restart was counted")
    return found


def differences(product: Product, undisturbed: Product) -> list[str]:
    """Differences between a result and the undisturbed run's."""
    found = [f"{folder} is not a complete checkpoint" for folder, whole in product.checkpoints.items() if not whole]
    if (distance := product.distance(undisturbed)) > TOLERANCE:
        found.append(f"its losses differ by {distance}")
    if product.adapter != undisturbed.adapter:
        found.append("its adapter has other bytes")
    return found


def _user_restarts(kinds: Sequence[Kind]) -> range:
    """Allowed numbers of user restarts: one for each kill, or fewer if another disturbance ended the same attempt."""
    killed = list(kinds).count(TRAINER_KILLED)
    graver = [kind for kind in kinds if not kind.harmless and kind != TRAINER_KILLED]
    return range(0 if graver else killed, killed + 1)

"""GPU-hours of a run by stage and attempt, from the times in its status. Pure; `now` is passed in."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from internvl_api.status import StageStatus, Usage

from internvl_operator.core.attempt_history import gpu_seconds
from internvl_operator.kubectl_ivft.humanize import clock, took


@dataclass(frozen=True)
class Line:
    """One line of the table; `stage` and `attempt` of a sum say what it sums up."""

    stage: str
    attempt: str
    started: str = ""
    took: str = ""
    gpus: str = ""
    gpu_hours: float = 0.0
    ended: str = ""
    is_sum: bool = False


def lines(entries: Sequence[StageStatus], now: datetime) -> list[Line]:
    """The attempts of all stages, with a sum for a stage of several, and for the run; empty without any."""
    found: list[Line] = []
    for entry in entries:
        attempts = _attempts(entry, now)
        found += attempts
        if len(attempts) > 1:
            found.append(_sum(entry.name, "all", attempts))
    return [*found, _sum("run", "", [line for line in found if not line.is_sum])] if found else []


def price(usage: Usage | None) -> float | None:
    """The operator's price of a GPU-hour, as far as a recorded cost tells; None without one."""
    return usage.cost / usage.gpu_hours if usage and usage.cost is not None and usage.gpu_hours else None


def _attempts(entry: StageStatus, now: datetime) -> list[Line]:
    earlier = (
        [Line(entry.name, "earlier", gpu_hours=entry.earlier_gpu_seconds / 3600)] if entry.earlier_gpu_seconds else []
    )
    return earlier + [
        Line(
            stage=entry.name,
            attempt=str(attempt.number),
            started=clock(attempt.started_at, now),
            took=took(attempt.started_at, attempt.finished_at, now),
            gpus=str(attempt.gpus),
            gpu_hours=gpu_seconds(attempt, now) / 3600,
            ended=(attempt.reason or "") if attempt.finished_at else "running",
        )
        for attempt in entry.attempts or ()
    ]


def _sum(stage: str, attempt: str, parts: Sequence[Line]) -> Line:
    return Line(stage, attempt, gpu_hours=sum(line.gpu_hours for line in parts), is_sum=True)

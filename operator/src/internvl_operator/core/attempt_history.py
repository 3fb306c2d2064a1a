"""The attempts that status lists for each stage: when each held its GPUs, and how it ended.

An attempt begins when its first pod is on a node: pods that wait for a node or in a queue hold no GPU. It ends with the
pass that counts its end. The list survives a changed spec, which starts the stages again.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime

from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.status import ATTEMPTS_LISTED, AttemptStatus, InternVLFineTuneStatus, StageStatus

from internvl_operator.core import stages
from internvl_operator.core.observe import Pod
from internvl_operator.core.stages import Stage
from internvl_operator.core.timestamps import from_text, to_text

_ENDED = (*stages.DONE, "Failed")


def record(
    old: InternVLFineTuneStatus,
    new: InternVLFineTuneStatus,
    pods: Sequence[Pod],
    spec: InternVLFineTuneSpec | None,
    now: datetime,
) -> None:
    """Write the attempts, as this pass sees them, into `new`.

    `old`: the recorded status; `spec`: None when it is invalid. An attempt whose pods have a node and do not run yet is
    listed with the next change of the status: its times come from the pods, so no write is needed for it alone.
    """
    writes = new != old
    before = {entry.name: entry for entry in old.stages}
    current = stages.current(new.stages)
    for entry in new.stages:
        known = before.get(entry.name) or StageStatus(name=entry.name)
        listed = [attempt.model_copy() for attempt in known.attempts or ()]
        if spec is not None and known.state not in _ENDED:
            listed += _begun(entry, listed, [pod for pod in pods if _listable(pod, writes)], spec, now)
        lasts = current is not None and entry.name == current.name and entry.state != "Failed"
        for attempt in listed:
            if attempt.finished_at is None and not (lasts and attempt.number == new.attempt):
                attempt.finished_at, attempt.reason = to_text(now), _end(entry, new, now)
        dropped, entry.attempts = listed[:-ATTEMPTS_LISTED], listed[-ATTEMPTS_LISTED:] or None
        earlier = (known.earlier_gpu_seconds or 0) + sum(gpu_seconds(attempt, now) for attempt in dropped)
        entry.earlier_gpu_seconds = round(earlier) or None


def gpu_seconds(attempt: AttemptStatus, now: datetime) -> float:
    """GPUs times seconds of one attempt, up to now while it lasts."""
    start, end = from_text(attempt.started_at), from_text(attempt.finished_at) or now
    return attempt.gpus * max(0.0, (end - start).total_seconds()) if start else 0.0


def _begun(
    entry: StageStatus,
    listed: Sequence[AttemptStatus],
    pods: Iterable[Pod],
    spec: InternVLFineTuneSpec,
    now: datetime,
) -> list[AttemptStatus]:
    """The attempts of these pods that are not listed yet."""
    stage, newest = Stage(entry.name), listed[-1].number if listed else 0
    placed: dict[int, list[Pod]] = {}
    for pod in pods:
        if pod.stage == entry.name and pod.attempt > newest:
            placed.setdefault(pod.attempt, []).append(pod)
    gpus = stage.size(spec) * stage.gpus(spec)
    return [
        AttemptStatus(number=number, gpus=gpus, started_at=to_text(_start(entry, group, now)))
        for number, group in sorted(placed.items())
    ]


def _listable(pod: Pod, writes: bool) -> bool:
    return pod.running or pod.finished or (writes and pod.node is not None)


def _start(entry: StageStatus, group: Iterable[Pod], now: datetime) -> datetime:
    """When the first pod was on its node; a node's clock may be wrong."""
    earliest = from_text(entry.started_at) or now
    return min(now, max(earliest, min((pod.start_time for pod in group if pod.start_time), default=now)))


def _end(entry: StageStatus, new: InternVLFineTuneStatus, now: datetime) -> str:
    if entry.state == "Succeeded":
        return "Succeeded"
    if entry.reason and entry.finished_at == to_text(now):
        return entry.reason
    return "Suspended" if new.phase == "Suspended" else "SpecChanged"

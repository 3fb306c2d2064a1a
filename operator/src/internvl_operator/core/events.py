"""Kubernetes Events for the change from one status to the next."""

import re
from collections.abc import Iterator

from internvl_api.status import Condition, InternVLFineTuneStatus, StageStatus

from internvl_operator.core.plan import Event
from internvl_operator.core.stages import ending

_REASON = re.compile(r"[A-Z][A-Za-z0-9]{0,127}")


def events_between(old: InternVLFineTuneStatus, new: InternVLFineTuneStatus) -> tuple[Event, ...]:
    """One Event for each change that matters to a user; empty when there is none."""
    return tuple(_events(old, new))


def _events(old: InternVLFineTuneStatus, new: InternVLFineTuneStatus) -> Iterator[Event]:
    before = {entry.name: entry for entry in old.stages}
    for entry in new.stages:
        yield from _stage_events(before.get(entry.name) or StageStatus(name=entry.name), entry)
    for kind in ("Stalled", "Suspended", "Complete"):  # a failed run is Stalled too
        told, tells = _find(old, kind), _find(new, kind)
        if tells and tells.status == "True" and (told is None or (told.status, told.reason) != ("True", tells.reason)):
            yield Event("Warning" if kind == "Stalled" else "Normal", tells.reason, tells.message)
    warning = new.progress.warning if new.progress else None
    if warning and (old.progress is None or old.progress.warning != warning):
        reason, _, message = warning.partition(": ")
        if _REASON.fullmatch(reason):  # a pod may send anything; status has its words
            yield Event("Warning", reason, message)
    told, tells = _find(old, "MemoryEstimate"), _find(new, "MemoryEstimate")
    if tells and tells.status == "False" and (told is None or told.message != tells.message):
        yield Event("Warning", tells.reason, tells.message)


def _stage_events(old: StageStatus, new: StageStatus) -> Iterator[Event]:
    if new.attempt != old.attempt and new.attempt:
        yield Event("Normal", "StageStarted", f"{new.name}: attempt {new.attempt} started")
    if new.message and new.state != "Succeeded" and (new.reason, new.message) != (old.reason, old.message):
        yield Event("Warning", "AttemptEnded", f"{new.name}: {ending(new)}")
    if new.state == "Succeeded" and old.state != "Succeeded":
        yield Event("Normal", "StageSucceeded", f"{new.name} succeeded")


def _find(status: InternVLFineTuneStatus, kind: str) -> Condition | None:
    return next((condition for condition in status.conditions if condition.type == kind), None)

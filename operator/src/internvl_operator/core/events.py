"""Kubernetes Events for the change from one status to the next."""

import re
from collections.abc import Iterator

from internvl_api.status import Condition, InternVLFineTuneStatus, StageStatus

from internvl_operator.core.conditions import note_of_change
from internvl_operator.core.plan import Event
from internvl_operator.core.policies import bad_nodes
from internvl_operator.core.stages import ending

_REASON = re.compile(r"[A-Z][A-Za-z0-9]{0,127}")


def events_between(old: InternVLFineTuneStatus, new: InternVLFineTuneStatus) -> tuple[Event, ...]:
    """One Event for each change that matters to a user; empty when there is none."""
    return tuple(_events(old, new))


def _events(old: InternVLFineTuneStatus, new: InternVLFineTuneStatus) -> Iterator[Event]:
    before = {entry.name: entry for entry in old.stages}
    summaries = list(_summaries(old, new))
    told_reasons = {event.reason for event in summaries}
    for entry in new.stages:
        yield from _stage_events(before.get(entry.name) or StageStatus(name=entry.name), entry, told_reasons)
    yield from summaries
    if (note := note_of_change(new.conditions)) and not note_of_change(old.conditions):
        yield Event("Warning", "SpecChangeIgnored", note)
    for node in sorted({*bad_nodes.avoided(new)} - {*bad_nodes.avoided(old)}):
        yield Event("Warning", "NodeAvoided", f"node {node} {bad_nodes.AVOIDED}; its next attempts avoid it")
    warning = new.progress.warning if new.progress else None
    if warning and (old.progress is None or old.progress.warning != warning):
        reason, _, message = warning.partition(": ")
        if _REASON.fullmatch(reason):  # a pod may send anything; status has its words
            yield Event("Warning", reason, message)
    told, tells = _find(old, "MemoryEstimate"), _find(new, "MemoryEstimate")
    if tells and tells.status == "False" and (told is None or told.message != tells.message):
        yield Event("Warning", tells.reason, tells.message)


def _summaries(old: InternVLFineTuneStatus, new: InternVLFineTuneStatus) -> Iterator[Event]:
    for kind in ("Stalled", "Suspended", "Complete"):  # a failed run is Stalled too
        told, tells = _find(old, kind), _find(new, kind)
        if tells and tells.status == "True" and (told is None or (told.status, told.reason) != ("True", tells.reason)):
            yield Event("Warning" if kind == "Stalled" else "Normal", tells.reason, tells.message)


def _stage_events(old: StageStatus, new: StageStatus, told: set[str]) -> Iterator[Event]:
    """`told`: reasons of which the run's own events tell already."""
    if new.attempt != old.attempt and new.attempt:
        yield Event("Normal", "StageStarted", f"{new.name}: attempt {new.attempt} started")
    is_news = (new.reason, new.message) != (old.reason, old.message) and new.reason not in told
    if new.message and new.state != "Succeeded" and is_news:
        yield Event("Warning", "AttemptEnded", f"{new.name}: {ending(new)}")
    if new.state == "Succeeded" and old.state != "Succeeded":
        yield Event("Normal", "StageSucceeded", f"{new.name} succeeded")


def _find(status: InternVLFineTuneStatus, kind: str) -> Condition | None:
    return next((condition for condition in status.conditions if condition.type == kind), None)

"""Kubernetes Events for the change from one status to the next."""

import re
from collections.abc import Iterator

from internvl_api.status import Condition, InternVLFineTuneStatus, StageStatus

from internvl_operator.core.conditions import ESTIMATES, note_of_change
from internvl_operator.core.plan import Event
from internvl_operator.core.policies import bad_nodes
from internvl_operator.core.stages import ending

_REASON = re.compile(r"[A-Z][A-Za-z0-9]{0,127}")


def events_between(old: InternVLFineTuneStatus, new: InternVLFineTuneStatus) -> tuple[Event, ...]:
    """One Event for each change that matters to a user; empty when there is none."""
    return tuple(_events(old, new))


def _events(old: InternVLFineTuneStatus, new: InternVLFineTuneStatus) -> Iterator[Event]:
    before = {entry.name: entry for entry in old.stages}
    run_events = [*_run_events(old, new), *_size_events(old, new)]
    reported = {event.reason for event in run_events}
    for entry in new.stages:
        yield from _stage_events(before.get(entry.name) or StageStatus(name=entry.name), entry, reported)
    yield from run_events
    if (note := note_of_change(new.conditions)) and not note_of_change(old.conditions):
        yield Event("Warning", "SpecChangeIgnored", note)
    for node in sorted({*bad_nodes.avoided(new)} - {*bad_nodes.avoided(old)}):
        yield Event("Warning", "NodeAvoided", f"node {node} {bad_nodes.AVOIDED}; its next attempts avoid it")
    warning = new.progress.warning if new.progress else None
    if warning and (old.progress is None or old.progress.warning != warning):
        reason, _, message = warning.partition(": ")
        if _REASON.fullmatch(reason):  # a pod may send anything; what is no reason stays in status alone
            yield Event("Warning", reason, message)
    problem = new.progress.tracking_problem if new.progress else None
    if problem and (old.progress is None or old.progress.tracking_problem is None):
        yield Event("Warning", "TrackingFailing", problem)
    ended = new.progress.ended_early if new.progress else None
    if ended and (old.progress is None or old.progress.ended_early != ended):
        yield Event("Normal", "EarlyStopped", ended)
    for kind in ESTIMATES:
        was, now = _find(old, kind), _find(new, kind)
        if now and now.status == "False" and (was is None or was.message != now.message):
            yield Event("Warning", now.reason, now.message)


def _run_events(old: InternVLFineTuneStatus, new: InternVLFineTuneStatus) -> Iterator[Event]:
    """Events for conditions of the whole run that became True."""
    for kind in ("Stalled", "Suspended", "Complete"):  # a failed run is Stalled too
        was, now = _find(old, kind), _find(new, kind)
        if now and now.status == "True" and (was is None or (was.status, was.reason) != ("True", now.reason)):
            yield Event("Warning" if kind == "Stalled" else "Normal", now.reason, now.message)


def _size_events(old: InternVLFineTuneStatus, new: InternVLFineTuneStatus) -> Iterator[Event]:
    """Events for a group that gets fewer workers than the spec asks for, and all of them again."""
    was, now = old.elastic, new.elastic
    if now and now.growing_from is not None and (was is None or was.growing_from is None):
        yield Event("Normal", "WorkersGrowing", f"tries {now.wanted} workers instead of {now.growing_from}")
    elif now and now.workers < (was.workers if was else now.wanted):
        yield Event("Warning", "WorkersReduced", now.message)
    elif was and now is None and new.phase == "Running":
        yield Event("Normal", "WorkersRestored", f"all {was.wanted} workers run again")


def _stage_events(old: StageStatus, new: StageStatus, reported: set[str]) -> Iterator[Event]:
    """Events for one stage. `reported`: reasons that events of the run report already."""
    if new.attempt != old.attempt and new.attempt:
        yield Event("Normal", "StageStarted", f"{new.name}: attempt {new.attempt} started")
    is_news = (new.reason, new.message) != (old.reason, old.message) and new.reason not in reported
    if new.message and new.state != "Succeeded" and is_news:
        yield Event("Warning", "AttemptEnded", f"{new.name}: {ending(new)}")
    if new.state == "Succeeded" and old.state != "Succeeded":
        yield Event("Normal", "StageSucceeded", f"{new.name} succeeded")


def _find(status: InternVLFineTuneStatus, kind: str) -> Condition | None:
    return next((condition for condition in status.conditions if condition.type == kind), None)

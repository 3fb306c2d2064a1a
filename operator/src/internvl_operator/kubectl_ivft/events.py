"""The events of a run and of its children, one line for each cause."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, get_args

from internvl_api.constants import KIND
from internvl_api.status import StageName

from internvl_operator.core.resources import names
from internvl_operator.core.timestamps import from_text

Raw = dict[str, Any]
_SHORT = {KIND: "ivft"}  # as `kubectl get` takes it
_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Cause:
    """Events of the same type, reason and message, on one object or on several workers."""

    first: datetime
    last: datetime
    count: int
    warning: bool
    reason: str
    message: str
    objects: tuple[str, ...]


def causes(run: Raw, events: Iterable[Raw]) -> list[Cause]:
    """What happened to a run, in the order of the last occurrence. `events`: all events of its namespace."""
    by_cause: dict[tuple[str, str, str, str], list[Raw]] = {}
    for event in _of(run, events):
        name = event["involvedObject"].get("name", "")
        message = _words(event).replace(name, "\0") if name else _words(event)
        kind = event["involvedObject"].get("kind", "")
        by_cause.setdefault((kind, event.get("type", ""), event.get("reason", ""), message), []).append(event)
    return sorted(map(_cause, by_cause.values()), key=lambda cause: (cause.last, cause.first))


def _cause(same: list[Raw]) -> Cause:
    newest = max(same, key=_last)
    return Cause(
        first=min(map(_first, same)),
        last=_last(newest),
        count=sum(map(_count, same)),
        warning=newest.get("type") == "Warning",
        reason=newest.get("reason") or "",
        message=_words(newest),
        objects=tuple(sorted({_object(event) for event in same})),
    )


def _of(run: Raw, events: Iterable[Raw]) -> Iterator[Raw]:
    """The events of the run and of its children, without those of an earlier run of the same name."""
    metadata = run["metadata"]
    created = from_text(metadata.get("creationTimestamp")) or _NEVER
    children = _children(metadata["name"])
    for event in events:
        about = event.get("involvedObject") or {}
        if about.get("kind") == KIND:
            if about.get("uid") == metadata["uid"]:
                yield event
        elif children.fullmatch(f"{about.get('kind')}/{about.get('name')}") and _last(event) >= created:
            yield event


def _children(name: str) -> re.Pattern[str]:
    """Matches `kind/name` of every object that the operator, or Kueue, makes for the run."""
    stage, number = "|".join(get_args(StageName)), "[0-9]+"
    base, shared = re.escape(names.base(name)), re.escape(names.service(name))
    return re.compile(
        f"(Pod|Workload)/{base}-({stage})-{number}|(Service|ConfigMap|NetworkPolicy)/{shared}"
        f"|PodGroup/{shared}-({stage})"
    )


def _object(event: Raw) -> str:
    about = event["involvedObject"]
    return f"{_SHORT.get(about['kind'], about['kind'].lower())}/{about.get('name', '')}"


def _words(event: Raw) -> str:
    return " ".join((event.get("message") or "").split())


def _count(event: Raw) -> int:
    counts = (event.get("series") or {}).get("count"), event.get("count")
    return max(1, *(count for count in counts if isinstance(count, int)), 1)


def _last(event: Raw) -> datetime:
    series = event.get("series") or {}
    times = (from_text(text) for text in (series.get("lastObservedTime"), event.get("lastTimestamp")))
    return max((time for time in times if time), default=None) or _first(event)


def _first(event: Raw) -> datetime:
    texts = event.get("firstTimestamp"), event.get("eventTime"), event["metadata"].get("creationTimestamp")
    return next((time for time in map(from_text, texts) if time), _NEVER)

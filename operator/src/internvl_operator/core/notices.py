"""Notices of the ends of runs: which status change is one, and its text for a webhook.

A notice is written into status together with the end itself and stays there until it is delivered. So a crash loses
none, and an operator that starts sends only what is still open, never an old end.
"""

import hashlib
import json
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from internvl_api.constants import GROUP, KIND, PLURAL, VERSION
from internvl_api.status import InternVLFineTuneStatus, Notice

from internvl_operator.core.telemetry import clean_text
from internvl_operator.core.timestamps import from_text, to_text

Form = Literal["cloudevents", "slack"]
FORMS: tuple[Form, ...] = ("cloudevents", "slack")
GIVE_UP_AFTER = timedelta(hours=24)
_MESSAGE_LIMIT = 1024  # characters
_ENDS: tuple[Literal["Complete", "Failed", "Stalled"], ...] = ("Complete", "Failed", "Stalled")  # Failed is Stalled too


class End(NamedTuple):
    """A condition that ends a run, or stops it until somebody acts."""

    type: Literal["Complete", "Failed", "Stalled"]
    reason: str
    message: str


def next_notice(
    uid: str,
    generation: int,
    old: InternVLFineTuneStatus,
    new: InternVLFineTuneStatus,
    delivered: str | None,
    now: datetime,
) -> Notice | None:
    """The notice to keep in status: a new one for an end that this pass finds, else the recorded one.

    The same end of the same generation, such as a stall that a retry repeats, is one notice. `delivered`: the id that
    every receiver has taken.
    """
    known, end = old.notice, _end(new)
    if end is not None and (end.type, end.reason) != _kind(_end(old)):
        found = _id(uid, generation, end)
        if known is None or known.id != found:
            message = clean_text(end.message, _MESSAGE_LIMIT)
            return Notice(id=found, type=end.type, reason=end.reason, message=message, at=to_text(now))
    if known is not None and known.id == delivered and known.delivered_at is None:
        return known.model_copy(update={"delivered_at": to_text(now)})
    return known


def is_open(notice: Notice | None, now: datetime) -> bool:
    """Whether the notice must still be sent."""
    if notice is None or notice.delivered_at is not None:
        return False
    at = from_text(notice.at)
    return at is not None and now - at < GIVE_UP_AFTER


def body(form: Form, namespace: str, name: str, uid: str, status: InternVLFineTuneStatus) -> tuple[str, bytes]:
    """Content type and body of the open notice of a status."""
    notice = status.notice
    assert notice is not None
    if form == "slack":
        return "application/json", json.dumps({"text": _text(namespace, name, status, notice)}).encode()
    event = {
        "specversion": "1.0",
        "id": notice.id,
        "source": f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}/{name}",
        "type": f"dev.internvl.finetune.{notice.type.lower()}",
        "subject": f"{namespace}/{name}",
        "time": notice.at,
        "datacontenttype": "application/json",
        "data": _data(namespace, name, uid, status, notice),
    }
    return "application/cloudevents+json", json.dumps(event).encode()


def _data(namespace: str, name: str, uid: str, status: InternVLFineTuneStatus, notice: Notice) -> dict[str, Any]:
    usage = status.usage.to_dict() if status.usage else {}
    artifacts = dict(list(status.artifacts.items())[:64]) if notice.type == "Complete" else {}
    found = {
        "kind": KIND,
        "namespace": namespace,
        "name": name,
        "uid": uid,
        "condition": notice.type,
        "reason": notice.reason,
        "message": notice.message,
        "stage": status.stage,
        "startedAt": status.started_at,
        "finishedAt": status.finished_at,
        "artifacts": artifacts,
        **usage,
    }
    return {key: value for key, value in found.items() if value not in (None, {})}


def _text(namespace: str, name: str, status: InternVLFineTuneStatus, notice: Notice) -> str:
    said = {"Complete": "is complete", "Failed": "has failed", "Stalled": "is stalled and waits for you"}[notice.type]
    usage = status.usage
    cost = f", {usage.cost:.2f} {usage.currency or ''}".rstrip() if usage and usage.cost is not None else ""
    hours = f" ({usage.gpu_hours:.2f} GPU-hours{cost})" if usage else ""
    message = f"*{namespace}/{name}* {said}{hours}: {notice.reason}: {notice.message}"
    return message.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _end(status: InternVLFineTuneStatus) -> End | None:
    true = {each.type: each for each in status.conditions if each.status == "True"}
    return next((End(kind, true[kind].reason, true[kind].message) for kind in _ENDS if kind in true), None)


def _kind(end: End | None) -> tuple[str, str] | None:
    return (end.type, end.reason) if end else None


def _id(uid: str, generation: int, end: End) -> str:
    return hashlib.sha256(f"{uid}/{generation}/{end.type}/{end.reason}".encode()).hexdigest()[:32]

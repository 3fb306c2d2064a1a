"""Send Kubernetes Events from a separate thread: they may be late or lost, but never delay a pass.

An event that repeats an earlier one, except for numbers and times, raises the count of the earlier one.
"""

import itertools
import logging
import queue
import re
import threading
import time
from collections import OrderedDict
from typing import Any, NamedTuple

from internvl_api.constants import API_VERSION, KIND

from internvl_operator import metrics
from internvl_operator.core.plan import Event
from internvl_operator.core.run import Run
from internvl_operator.core.telemetry import printable
from internvl_operator.kube.client import FIELD_MANAGER, Api, ApiError

_QUEUE_LIMIT = 2000
_NAME_LIMIT = 253 - 17  # of an object's name, less the dot and the number
_MESSAGE_LIMIT = 1024  # bytes, the API's own
_REMEMBERED = 2000  # events that a repetition may raise; the API server keeps each for an hour
_NOT_COUNTED = (403, 404)  # no right to patch events (an older chart), or the event has expired
_VARIABLE = re.compile(r"[0-9]+")

logger = logging.getLogger(__name__)


class _Sent(NamedTuple):
    name: str
    times: int


class EventRecorder:
    """Accepts events at any rate; drops and counts them while the queue is full."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUE_LIMIT)
        self._numbers = itertools.count(time.time_ns())  # growing across restarts
        self._sent: OrderedDict[tuple[str, ...], _Sent] = OrderedDict()  # only the thread uses it
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        """Start sending."""
        self._thread.start()

    def send(self, run: Run, event: Event, now: str) -> None:
        """Never blocks, never raises."""
        try:
            self._queue.put_nowait(_build(run, event, now, next(self._numbers)))
        except queue.Full:
            metrics.EVENTS_DROPPED.inc()

    def _run(self) -> None:
        while (event := self._queue.get()) is not None:
            try:
                self._deliver(event)
            except ApiError as error:
                metrics.EVENTS_DROPPED.inc()
                logger.debug("event dropped: %s", error)
            except Exception:  # one failure must not end the thread
                metrics.EVENTS_DROPPED.inc()
                logger.exception("event dropped")

    def _deliver(self, event: dict[str, Any]) -> None:
        key = _cause(event)
        sent = self._sent.get(key)
        if sent is None or not self._raise_count(event, sent):
            self._api.create(event)
            sent = _Sent(event["metadata"]["name"], 0)
        self._sent[key] = sent._replace(times=sent.times + 1)
        self._sent.move_to_end(key)
        if len(self._sent) > _REMEMBERED:
            self._sent.popitem(last=False)

    def _raise_count(self, event: dict[str, Any], sent: _Sent) -> bool:
        """Count a repetition in the event that was sent; False when that is impossible and a new event is needed."""
        patch = {"count": sent.times + 1, "lastTimestamp": event["lastTimestamp"], "message": event["message"]}
        try:
            self._api.patch("Event", event["metadata"]["namespace"], sent.name, patch)
        except ApiError as error:
            if error.status in _NOT_COUNTED:
                return False
            raise
        return True


def _cause(event: dict[str, Any]) -> tuple[str, ...]:
    """A key that is equal for repetitions of an event: numbers and times in the message may differ."""
    about = event["involvedObject"]["uid"], event["type"], event["reason"]
    return *about, _VARIABLE.sub("#", event["message"])


def _build(run: Run, event: Event, now: str, number: int) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Event",
        # Times are whole seconds; kubectl orders events of the same second by name.
        "metadata": {"name": f"{run.name[:_NAME_LIMIT]}.{number:016x}", "namespace": run.namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "namespace": run.namespace,
            "name": run.name,
            "uid": run.uid,
        },
        "type": event.kind,
        "reason": event.reason,
        "message": printable(event.message).encode(errors="replace")[:_MESSAGE_LIMIT].decode(errors="ignore"),
        "source": {"component": FIELD_MANAGER},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }

"""Send Kubernetes Events from a separate thread: they may be late or lost, but never delay a pass."""

import itertools
import logging
import queue
import threading
import time
from typing import Any

from internvl_api.constants import API_VERSION, KIND

from internvl_operator import metrics
from internvl_operator.core.plan import Event
from internvl_operator.core.run import Run
from internvl_operator.kube.client import FIELD_MANAGER, Api, ApiError

_QUEUE_LIMIT = 2000
_NAME_LIMIT = 253 - 17  # of an object's name, less the dot and the number
_MESSAGE_LIMIT = 1024  # bytes, the API's own

logger = logging.getLogger(__name__)


class EventRecorder:
    """Accepts events at any rate; drops and counts them while the queue is full."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUE_LIMIT)
        self._numbers = itertools.count(time.time_ns())  # growing across restarts
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
                self._api.create(event)
            except ApiError as error:
                metrics.EVENTS_DROPPED.inc()
                logger.debug("event dropped: %s", error)


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
        "message": event.message.encode()[:_MESSAGE_LIMIT].decode(errors="ignore"),
        "source": {"component": FIELD_MANAGER},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }

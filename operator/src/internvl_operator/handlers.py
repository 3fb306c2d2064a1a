"""The handlers that kopf calls. They pass events on and return nothing, so that kopf writes nothing."""

import asyncio
import logging
import signal
from typing import Any

import kopf
from internvl_api.constants import GROUP, PLURAL, VERSION

from internvl_operator.controller import Controller
from internvl_operator.kube.client import ApiError

logger = logging.getLogger(__name__)


class _NoDiff(kopf.DiffBaseStorage):
    """Saves the copies that kopf keeps of each object for diffs, which no handler here needs."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
    """Configure kopf and start the controller; retry while the API server or the CRD is missing."""
    if memo.stop.is_set():  # the signal came before kopf handled signals
        signal.raise_signal(signal.SIGTERM)
    ours = memo.settings
    memo.beat = memo.get("beat") or asyncio.create_task(memo.health.beat())  # a retry: it runs already
    settings.posting.enabled = False
    settings.scanning.disabled = bool(ours.namespaces)  # a namespaced operator may not list the whole cluster
    settings.peering.standalone = True
    settings.watching.server_timeout = max(1, round(ours.watch_timeout_seconds))  # sent as an integer
    settings.watching.client_timeout = ours.watch_timeout_seconds + 10
    # To save memory: read long lists in chunks, and end kopf's task of each object soon.
    settings.watching.chunk_size, settings.queueing.idle_timeout = 250, 1.0
    settings.persistence.diffbase_storage = _NoDiff()
    settings.networking.request_timeout = ours.request_timeout_seconds
    try:
        await asyncio.to_thread(memo.api.get, f"/apis/{GROUP}/{VERSION}")
    except ApiError as error:
        text = f"{PLURAL}.{GROUP} is not served yet ({error}); is the CRD installed?"
        raise kopf.TemporaryError(text, delay=2) from error
    await asyncio.to_thread(memo.controller.start)
    memo.health.not_ready = None


@kopf.on.cleanup()
async def stop(memo: kopf.Memo, **_: Any) -> None:
    """End the controller's threads."""
    memo.idle = await asyncio.to_thread(memo.controller.stop)


@kopf.on.event(GROUP, VERSION, PLURAL)
async def run_event(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    """Pass a listed, created, changed or deleted run to the controller."""
    controller: Controller = memo.controller
    take = controller.run_gone if event["type"] == "DELETED" else controller.run_seen
    take(dict(event["object"]))

"""What kopf calls. A handler only passes on what it was told; nothing is returned, so kopf writes nothing."""

import asyncio
import logging
from typing import Any

import kopf
from internvl_api.constants import GROUP, PLURAL, VERSION

from internvl_operator.cluster.api import ApiError
from internvl_operator.controller import Controller

logger = logging.getLogger(__name__)


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
    """Configure kopf and start the controller; try again while the API server or the CRD is not there."""
    ours = memo.settings
    settings.posting.enabled = False
    settings.scanning.disabled = bool(ours.namespaces)  # a namespaced operator may not look at the whole cluster
    settings.peering.standalone = True
    settings.watching.server_timeout = max(1, round(ours.watch_timeout_seconds))  # it is sent as written
    settings.watching.client_timeout = ours.watch_timeout_seconds + 10
    settings.networking.request_timeout = ours.request_timeout_seconds
    try:
        await asyncio.to_thread(memo.api.get, f"/apis/{GROUP}/{VERSION}")
    except ApiError as error:
        text = f"{PLURAL}.{GROUP} is not served yet ({error}); is the CRD installed?"
        raise kopf.TemporaryError(text, delay=2) from error
    await asyncio.to_thread(memo.controller.start)


@kopf.on.cleanup()
async def stop(memo: kopf.Memo, **_: Any) -> None:
    """End the controller's threads."""
    await asyncio.to_thread(memo.controller.stop)


@kopf.on.event(GROUP, VERSION, PLURAL)
async def job_event(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    """Listed, created, changed or deleted: the controller decides what, if anything, there is to do."""
    controller: Controller = memo.controller
    take = controller.job_gone if event["type"] == "DELETED" else controller.job_seen
    take(dict(event["object"]))


@kopf.on.probe(id="controller", errors=kopf.ErrorsMode.PERMANENT)
async def healthy(memo: kopf.Memo, **_: Any) -> str:
    """Liveness. That this coroutine runs proves the event loop; the controller answers for its threads."""
    if problems := memo.controller.problems():
        raise kopf.PermanentError("; ".join(problems))
    return "ok"

"""Follows a run by watching its CR, without polling."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from internvl_api.constants import GROUP, PLURAL, VERSION
from internvl_api.status import InternVLFineTuneStatus
from kubernetes import client, watch
from urllib3.exceptions import HTTPError

WATCH_SECONDS = 30  # of one request; the next one starts where it ended


class RunProblem(RuntimeError):
    """The run failed, stalled, disappeared, or took too long; the message quotes the operator."""


def read_status(resource: dict[str, Any]) -> InternVLFineTuneStatus:
    """The typed status of a CR as the API server returns it; empty before the operator has seen it."""
    return InternVLFineTuneStatus.model_validate(resource.get("status") or {})


def changes(api: client.ApiClient, name: str, namespace: str, *, timeout: float) -> Iterator[dict[str, Any]]:
    """The current CR, then the CR after every change, across restarts of the API server.

    Raises RunProblem when it is deleted or `timeout` seconds are over.
    """
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        try:
            yield from _changes_of_one_watch(api, name, namespace, min(left, WATCH_SECONDS))
        except (HTTPError, client.ApiException) as error:
            if isinstance(error, client.ApiException) and error.status == 404:
                raise RunProblem(f"{PLURAL}.{GROUP} {namespace}/{name} does not exist") from error
            time.sleep(0.5)  # the API server is down, so there is nothing to watch
    raise RunProblem(f"{namespace}/{name}: not finished after {timeout:.0f} s")


def follow(
    api: client.ApiClient,
    name: str,
    namespace: str = "default",
    *,
    on_change: Callable[[InternVLFineTuneStatus], None] = lambda _: None,
    timeout: float = 600,
) -> InternVLFineTuneStatus:
    """Wait until the run ends and return its last status.

    Raises RunProblem when it failed, when it stalled (the user would have to correct something), or was deleted.
    """
    for resource in changes(api, name, namespace, timeout=timeout):
        status = read_status(resource)
        on_change(status)
        if status.phase == "Succeeded":
            return status
        if status.phase in ("Failed", "Stalled"):
            raise RunProblem(f"{namespace}/{name} is {status.phase}: {explain(status)}")
    raise AssertionError("changes() ends only by raising")


def explain(status: InternVLFineTuneStatus) -> str:
    """Reason and message of the condition that explains why a run does not continue."""
    conditions = {condition.type: condition for condition in status.conditions}
    stopped = [conditions[kind] for kind in ("Failed", "Stalled") if kind in conditions]
    told = next((each for each in stopped if each.status == "True"), conditions.get("Ready"))
    return f"{told.reason}: {told.message}" if told else "no condition yet"


def _changes_of_one_watch(api: client.ApiClient, name: str, namespace: str, seconds: float) -> Iterator[dict[str, Any]]:
    objects: Any = client.CustomObjectsApi(api)
    place = {"group": GROUP, "version": VERSION, "namespace": namespace, "plural": PLURAL}
    only = f"metadata.name={name}"
    listing = objects.list_namespaced_custom_object(**place, field_selector=only)
    if not listing["items"]:
        raise RunProblem(f"{namespace}/{name} does not exist")
    yield from listing["items"]
    watcher: Any = watch.Watch()  # type: ignore[no-untyped-call]
    events = watcher.stream(
        objects.list_namespaced_custom_object,
        **place,
        field_selector=only,
        resource_version=listing["metadata"]["resourceVersion"],
        timeout_seconds=max(1, int(seconds)),
    )
    for event in events:
        if event["type"] == "DELETED":
            raise RunProblem(f"{namespace}/{name} was deleted")
        yield event["object"]

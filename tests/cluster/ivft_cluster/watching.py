"""Follow all objects of a kind, across restarts of the API server."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from kubernetes import watch

Key = tuple[str, str]
T = TypeVar("T")


def follow(
    listing: Callable[..., Any],
    store: dict[Key, T],
    value: Callable[[Any], T],
    changed: Callable[[], None] = lambda: None,
) -> None:
    """Keep `store` ((namespace, name) → value of the object) equal to what the API server has; never returns.

    Starts over with a list whenever the watch breaks; calls `changed` after every change.
    """
    while True:
        try:
            page = listing()
            store.clear()
            store.update({_key(item): value(item) for item in page.items})
            changed()
            stream = watch.Watch().stream  # type: ignore[no-untyped-call]
            for event in stream(listing, resource_version=page.metadata.resource_version):  # type: ignore[no-untyped-call]
                item = event["object"]
                if event["type"] == "DELETED":
                    store.pop(_key(item), None)
                else:
                    store[_key(item)] = value(item)
                changed()
        except Exception as error:  # noqa: BLE001 - the API server may be down for a while: that is what tests do
            print(f"watch: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            time.sleep(0.3)


def _key(item: Any) -> Key:
    return item.metadata.namespace, item.metadata.name

"""Everything that ever was in a namespace, as the API server's own watches tell it."""

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from controller.builders import Raw
from controller.operator_process import POD_GROUPS, Cluster
from internvl_api.constants import GROUP, KIND, PLURAL, VERSION
from kubernetes import client, watch

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


class Witness:
    """Hears all events of a namespace while it is open; `changed` is notified of each."""

    def __init__(self, cluster: Cluster) -> None:
        self._namespace = cluster.namespace
        self.changed = threading.Condition()
        self.there: dict[tuple[str, str], Raw] = {}
        self._last: dict[tuple[str, str], Raw] = {}
        self._uids: dict[tuple[str, str], set[str]] = {}
        objects: Any = client.CustomObjectsApi(cluster.server.api)
        group, version, plural = POD_GROUPS
        self._listings: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
            KIND: (objects.list_namespaced_custom_object, (GROUP, VERSION, self._namespace, PLURAL)),
            "PodGroup": (objects.list_namespaced_custom_object, (group, version, self._namespace, plural)),
            "Pod": (cluster.core.list_namespaced_pod, (self._namespace,)),
            "Service": (cluster.core.list_namespaced_service, (self._namespace,)),
            "NetworkPolicy": (
                client.NetworkingV1Api(cluster.server.api).list_namespaced_network_policy,
                (self._namespace,),
            ),
            "ConfigMap": (cluster.core.list_namespaced_config_map, (self._namespace,)),
        }
        self._since = cluster.since
        self._watches = {kind: watch.Watch(return_type="object") for kind in self._listings}  # type: ignore[no-untyped-call]
        self._open = True

    def until(self, what: str, holds: Callable[[], Any], *, why: Callable[[], str], timeout: float = 120) -> None:
        """Returns as soon as `holds()`, which is asked after each event."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while not holds():
                if not self.changed.wait(deadline - time.monotonic()):
                    raise AssertionError(f"{what}: not after {timeout:.0f} s; {why()}")

    def in_the_end(self) -> dict[str, Raw]:
        """How often each object was made, and how it was last.

        Left out: uids, times, the name of the namespace, and texts that tell of a moment (how many workers run, how far
        a step is), which another operator may have looked at a moment later.
        """
        return {
            f"{kind} {name}": {"made": len(self._uids[kind, name]), **self._essence(raw)}
            for (kind, name), raw in self._last.items()
        }

    def _essence(self, raw: Raw) -> Raw:
        kept = {key: raw[key] for key in ("spec", "data") if key in raw}
        if raw["kind"] == KIND:
            kept["status"] = _without_passing_texts(raw["status"])
        metadata = {key: raw["metadata"].get(key) for key in ("name", "labels", "annotations", "finalizers")}
        owners = [owner["name"] for owner in raw["metadata"].get("ownerReferences", ())]
        text = json.dumps({**kept, "metadata": metadata, "owners": owners})
        for (kind, _), uids in self._uids.items():
            if kind == KIND:
                text = re.sub("|".join(uids), "UID", text)
        same: Raw = json.loads(_TIME.sub("TIME", text.replace(self._namespace, "NAMESPACE")))
        return same

    def _follow(self, kind: str) -> None:
        listing, words = self._listings[kind]
        try:
            for event in self._watches[kind].stream(listing, *words, resource_version=self._since):  # type: ignore[no-untyped-call]
                self._take(event["type"], kind, event["object"])
        except Exception:
            if self._open:
                raise

    def _take(self, verb: str, kind: str, raw: Raw) -> None:
        key = kind, raw["metadata"]["name"]
        with self.changed:
            self._last[key] = {**raw, "kind": kind}
            self._uids.setdefault(key, set()).add(raw["metadata"]["uid"])
            if verb == "DELETED":
                self.there.pop(key, None)
            else:
                self.there[key] = raw
            self.changed.notify_all()

    def __enter__(self) -> "Witness":
        for kind in self._listings:
            threading.Thread(target=self._follow, args=(kind,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        for each in self._watches.values():
            each.stop()  # type: ignore[no-untyped-call]


def _without_passing_texts(status: Raw) -> Raw:
    stages = [{key: value for key, value in stage.items() if key != "message"} for stage in status.get("stages", ())]
    return {key: value for key, value in status.items() if key != "progressText"} | {"stages": stages}

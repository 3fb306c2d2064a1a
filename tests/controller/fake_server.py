"""An API server and kubelets in memory. `Server` answers writes as an API server does and logs every watch event."""

import itertools
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

from controller.builders import NOW, Raw, text
from internvl_api.constants import KIND, LABEL_ATTEMPT, LABEL_STAGE
from internvl_api.status import Progress
from internvl_operator.core.observe import owner
from internvl_operator.kube.client import ApiError, resource_of

POD_GROUP = "PodGroup.scheduling.volcano.sh"


def clone(raw: Any) -> Any:
    """A copy, through JSON as on the wire (and several times faster than copy.deepcopy)."""
    return json.loads(json.dumps(raw))


class Killed(BaseException):
    """The operator's process ends here."""


class Server:
    """Objects by kind and name, one namespace; `log` is every watch event since the beginning."""

    timeout = 30.0

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Raw]] = {
            kind: {} for kind in ("Pod", "Service", "ConfigMap", "NetworkPolicy", KIND, POD_GROUP)
        }
        self.log: list[tuple[str, str, Raw]] = []
        self.now = NOW
        self.writes: list[tuple[str, str, str]] = []
        self.before_write: Callable[[], None] = lambda: None
        self.after_write: Callable[[], None] = lambda: None
        self.refuse: Callable[[Raw], ApiError | None] = lambda obj: None
        self.created: list[tuple[str, str]] = []
        self.events: list[tuple[str, str, str]] = []  # type, reason and message of Kubernetes Events
        self.silent: dict[str, float] = {}  # node -> seconds without a renewed Lease; its pods are silent too
        self.answers: dict[str, Progress] = {}  # pod -> what its /progress says; the others do not answer
        self._count = itertools.count(1)

    # --- what the operator calls

    def apply(self, obj: Raw, *, force: bool) -> Raw:
        with self._write("apply", obj):
            if error := self.refuse(obj):
                raise error
            kind = resource_of(obj)
            found = self.objects[kind].get(obj["metadata"]["name"])
            if found is None:
                self.created.append((kind, obj["metadata"]["name"]))
                return self._create(obj)
            if obj["kind"] == "Pod":
                if found["spec"] != obj["spec"]:
                    raise ApiError(422, "Invalid", "pod updates may not change fields")
                return clone(found)
            return self.change(kind, obj["metadata"]["name"], lambda raw: raw.update(_but_metadata(obj)))

    def patch(self, kind: str, namespace: str, name: str, patch: Raw) -> Raw:
        with self._write("patch", {"kind": kind, "metadata": {"name": name}}):
            found, wanted = self.objects[kind][name]["metadata"], clone(patch["metadata"])
            if any(found[key] != wanted[key] for key in ("uid", "resourceVersion")):
                raise ApiError(409, "Conflict", "the object has been modified")
            for part in ("labels", "annotations"):
                wanted[part] = found.get(part, {}) | wanted.get(part, {})
            return self.change(kind, name, lambda raw: raw["metadata"].update(wanted))

    def find(self, kind: str, namespace: str, name: str) -> Raw | None:
        return clone(self.objects[kind].get(name))

    def apply_status(self, obj: Raw) -> Raw:
        with self._write("status", obj):
            if error := self.refuse(obj):
                raise error
            found = self.objects[KIND].get(obj["metadata"]["name"])
            if found is None:
                raise ApiError(404, "NotFound", "not found")
            if found["metadata"]["resourceVersion"] != obj["metadata"]["resourceVersion"]:
                raise ApiError(409, "Conflict", "the object has been modified")
            status = clone(obj["status"])
            return self.change(KIND, obj["metadata"]["name"], lambda raw: raw.update(status=status))

    def delete(self, kind: str, namespace: str, name: str, *, uid: str, force: bool, grace: int | None = None) -> Raw:
        with self._write("delete", {"kind": kind, "metadata": {"name": name}}):
            found = self.objects[kind].get(name)
            if found is None:
                raise ApiError(404, "NotFound", "not found")
            if found["metadata"]["uid"] != uid:
                raise ApiError(409, "Conflict", "precondition failed")
            phase = found.get("status", {}).get("phase")
            if kind != "Pod" or force or phase in ("Pending", "Succeeded", "Failed"):
                self.remove(kind, name)
                return clone(found)
            seconds = found["spec"]["terminationGracePeriodSeconds"] if grace is None else grace
            ends = text(self.now + timedelta(seconds=seconds))
            if found["metadata"].get("deletionTimestamp", ends) < ends or (
                grace is None and "deletionTimestamp" in found["metadata"]
            ):
                return clone(found)
            return self.change(kind, name, lambda raw: raw["metadata"].update(deletionTimestamp=ends))

    # --- what users, kubelets and the garbage collector do

    def create(self, obj: Raw) -> Raw:
        """A user's object, or one the operator applied."""
        return self._create(obj)

    def change(self, kind: str, name: str, edit: Callable[[Raw], object]) -> Raw:
        """Change an object in place; nothing happens when the edit changes nothing."""
        found = self.objects[kind][name]
        before = clone(found)
        edit(found)
        if found != before:
            if before.get("spec") != found.get("spec"):
                found["metadata"]["generation"] = before["metadata"].get("generation", 1) + 1
            self._stamp(found)
            self.log.append(("MODIFIED", kind, clone(found)))
        return clone(found)

    def remove(self, kind: str, name: str) -> None:
        """Delete an object and, for a run, its children."""
        raw = self.objects[kind].pop(name)
        self._stamp(raw)
        self.log.append(("DELETED", kind, clone(raw)))
        if kind == KIND:
            for child_kind in ("Pod", "Service", "ConfigMap", "NetworkPolicy", POD_GROUP):
                for child, found in list(self.objects[child_kind].items()):
                    if (owner(found) or ("", ""))[1] == raw["metadata"]["uid"]:
                        self.remove(child_kind, child)

    def orphan(self, name: str = "run") -> None:
        """What `kubectl delete --cascade=orphan` does."""
        uid = self.objects[KIND][name]["metadata"]["uid"]
        for kind in ("Pod", "Service", "ConfigMap", "NetworkPolicy", POD_GROUP):
            for child, found in self.objects[kind].items():
                if (owner(found) or ("", ""))[1] == uid:
                    self.change(kind, child, lambda raw: raw["metadata"].pop("ownerReferences"))
        self.remove(KIND, name)

    def edit_spec(self, name: str = "run", **changes: Any) -> None:
        """What `kubectl edit` does."""
        self.change(KIND, name, lambda raw: raw.update(spec=raw["spec"] | changes))

    def set_pod(self, name: str, status: Raw) -> None:
        """Report a pod's status, as its kubelet does."""
        address = {"podIP": "10.0.0.1"} if status.get("phase") == "Running" else {}
        self.change("Pod", name, lambda raw: raw.update(status=raw.get("status", {}) | address | status))

    def drain(self, name: str, reason: str = "EvictionByEvictionAPI") -> None:
        """What `kubectl drain` does, or (by another reason) a scheduler that preempts."""
        self.set_pod(name, {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": reason}]})
        ends = text(self.now + timedelta(seconds=self.pods[name]["spec"]["terminationGracePeriodSeconds"]))
        self.change("Pod", name, lambda raw: raw["metadata"].update(deletionTimestamp=ends))

    def evict_deleted(self) -> None:
        """Every kubelet has ended the pods it was asked to end."""
        for name, raw in list(self.objects["Pod"].items()):
            if "deletionTimestamp" in raw["metadata"]:
                self.remove("Pod", name)

    # --- what a test looks at

    @property
    def pods(self) -> dict[str, Raw]:
        return self.objects["Pod"]

    def status(self, name: str = "run") -> Raw:
        found: Raw = self.objects[KIND][name].get("status", {})
        return found

    def condition(self, kind: str, name: str = "run") -> Raw:
        (found,) = [c for c in self.status(name)["conditions"] if c["type"] == kind]
        return found

    def attempts(self, stage: str) -> set[str]:
        """Attempt labels of a stage's pods."""
        labels = [raw["metadata"]["labels"] for raw in self.pods.values()]
        return {label[LABEL_ATTEMPT] for label in labels if label[LABEL_STAGE] == stage}

    def _create(self, obj: Raw) -> Raw:
        raw = clone(obj)
        raw["metadata"] = {"uid": f"uid-{next(self._count)}", "generation": 1, **raw["metadata"]}
        self._stamp(raw)
        if raw["kind"] == "Pod":
            raw.setdefault("status", {"phase": "Pending"})
        self.objects[resource_of(raw)][raw["metadata"]["name"]] = raw
        self.log.append(("ADDED", resource_of(raw), clone(raw)))
        return clone(raw)

    def _stamp(self, raw: Raw) -> None:
        raw["metadata"]["resourceVersion"] = str(100 + next(self._count))

    def _write(self, verb: str, obj: Raw) -> "_Write":
        self.before_write()
        self.writes.append((verb, obj["kind"], obj["metadata"]["name"]))
        return _Write(self)


class _Write:
    """Between the write and its answer the operator, or the connection, may die."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self._server.after_write()


def clock(server: Server, seconds: float) -> datetime:
    """Let time pass."""
    server.now += timedelta(seconds=seconds)
    return server.now


def names_of(server: Server, stage: str) -> Iterator[str]:
    """Pods of a stage, in order."""
    for name, raw in sorted(server.pods.items()):
        if raw["metadata"]["labels"][LABEL_STAGE] == stage:
            yield name


def _but_metadata(obj: Raw) -> Raw:
    return {key: value for key, value in clone(obj).items() if key != "metadata"}

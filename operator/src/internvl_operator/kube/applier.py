"""Carries out a plan: children, then status, then deletions; writes only what differs.

The order is what makes a crash harmless. Children first: their names and labels say which attempt they belong to.
Status before deletions: an end that was counted is on record before its evidence goes.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from typing import Any, TypeVar

from internvl_api.constants import API_VERSION, KIND
from internvl_api.status import InternVLFineTuneStatus

from internvl_operator.core.observe import owner
from internvl_operator.core.plan import Plan, Ref
from internvl_operator.core.run import Key, Run
from internvl_operator.kube.cache import Collection, RunCache, contains
from internvl_operator.kube.client import Api, ApiError, resource_of

Raw = dict[str, Any]
T = TypeVar("T")
logger = logging.getLogger(__name__)
_ALONE = 2  # up to so many requests are not worth handing to other threads


class Refused(Exception):
    """The API server will not have a child as it is; `reason` is a condition's."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class Applier:
    """Writes through `api`, and puts the answers into the caches, so that the next pass sees its own writes."""

    def __init__(
        self,
        api: Api,
        runs: RunCache,
        children: Mapping[str, Collection[Any]],
        executor: Executor,
    ) -> None:
        """`children`: by resource, as `resource_of` names it."""
        self._api, self._runs, self._children, self._executor = api, runs, children, executor
        # The status asked for, by uid, where the server made another of it: one that prunes what its older CRD does not
        # know would otherwise be asked again for ever.
        self._asked: dict[str, Raw] = {}
        self._undeclared: set[tuple[str, ...]] = set()  # fields of a status that the installed CRD does not have

    def carry_out(self, run: Run, plan: Plan) -> int:
        """The number of pods made. Raises Refused for a child, ApiError for anything that may pass."""
        missing = [obj for obj in plan.apply if not self._there(obj)]
        shared = [obj for obj in missing if obj["kind"] != "Pod"]
        pods = [obj for obj in missing if obj["kind"] == "Pod"]
        for obj in shared:  # first: a pod waits in vain for a ConfigMap that is not there
            self._apply(obj)
        self._each(self._apply, pods)
        try:
            if plan.status is not None:
                self.write_status(run, plan.status)
        except ApiError as error:
            if plan.delete_anyway and error.status not in (0, 404, 409):  # not answered, gone, or out of date
                self._remove(run, plan)
            raise
        self._remove(run, plan)
        return len(pods)

    def _remove(self, run: Run, plan: Plan) -> None:
        self._each(lambda ref: self._delete(run, ref), plan.delete)

    def write_status(self, run: Run, status: InternVLFineTuneStatus) -> bool:
        """True when there was something to write."""
        wanted = _without(status.to_dict(), self._undeclared)
        if wanted in (run.raw_status, self._asked.get(run.uid)):
            return False
        obj = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            # The version makes the server refuse (409) a status meant for an earlier run of this name: it ignores the
            # uid of a status. A run that was edited meanwhile refuses it too, and the pass is made again.
            "metadata": {
                "name": run.name,
                "namespace": run.namespace,
                "uid": run.uid,
                "resourceVersion": run.version,
            },
            "status": wanted,
        }
        answer = self._apply_status(obj)
        self._runs.answered(answer)
        self.forget(run.uid)
        if answer.get("status") != wanted:
            self._asked[run.uid] = wanted
        return True

    def _apply_status(self, obj: Raw) -> Raw:
        """An older CRD refuses a whole status for a field that it does not know: written is what it does know."""
        try:
            return self._api.apply_status(obj)
        except ApiError as error:
            _, *path = error.undeclared or ("",)
            if not path or tuple(path) in self._undeclared:
                raise
            logger.warning("the CRD is older than this operator: it has no status.%s; update it", ".".join(path))
            self._undeclared.add(tuple(path))
        return self._apply_status(obj | {"status": _without(obj["status"], self._undeclared)})

    def forget(self, uid: str) -> None:
        """The run is gone."""
        self._asked.pop(uid, None)

    def _there(self, obj: Raw) -> bool:
        found = self._children[resource_of(obj)].get(_key(obj))
        if found is None or obj["kind"] == "Pod":  # a pod cannot be changed: one that is there is as it was made
            return found is not None
        wanted = {key: value for key, value in obj.items() if key not in ("apiVersion", "kind")}  # lists leave them out
        return contains(found, wanted)

    def _apply(self, obj: Raw) -> None:
        collection = self._children[resource_of(obj)]
        seen = collection.get(_key(obj)) is not None
        if not seen and obj["kind"] != "Pod":  # an apply would merge ours into it; a pod cannot be changed so
            self._check_name_is_free(obj)
        try:
            # What we have never seen may be somebody else's: only our own is taken back by force.
            collection.answered(self._api.apply(obj, force=seen))
        except ApiError as error:
            name = f"{obj['kind']} {obj['metadata']['name']}"
            if error.unknown_kind:
                text = f"spec.scheduling.gang: the cluster knows no {name} ({obj['apiVersion']}); is its CRD installed?"
                raise Refused("GangNotEnabled", text) from error
            if error.refused:
                if obj["kind"] == "Pod":
                    self._check_name_is_free(obj)
                raise Refused(_reason(error), f"the API server refuses {name}: {error.message}") from error
            raise

    def _check_name_is_free(self, obj: Raw) -> None:
        """Of what the watches do not show, as it has not our labels; ours are there when an answer was lost."""
        kind, (namespace, name) = resource_of(obj), _key(obj)
        found = self._api.find(kind, namespace, name)
        if found is not None and not owned_alike(found, obj):
            text = (
                f"found {obj['kind']} {name} of somebody else, whose name the run needs; delete it, or rename the run"
            )
            raise Refused("NameTaken", text)

    def _delete(self, run: Run, ref: Ref) -> None:
        try:
            answer = self._api.delete(ref.kind, run.namespace, ref.name, uid=ref.uid, force=ref.force)
        except ApiError as error:
            if error.status not in (404, 409):  # gone already, or the name belongs to another by now
                raise
        else:
            if ref.kind == "Pod" and "deletionTimestamp" in answer.get("metadata", {}):
                self._children["Pod"].answered(answer)

    def _each(self, act: Callable[[T], None], items: Iterable[T]) -> None:
        todo = list(items)
        if len(todo) <= _ALONE:
            for item in todo:
                act(item)
        else:
            for future in [self._executor.submit(act, item) for item in todo]:
                future.result()


def _without(value: Any, paths: set[tuple[str, ...]]) -> Any:
    """A status without these fields; a list is no step of a path."""
    if not paths or not isinstance(value, dict | list):
        return value
    if isinstance(value, list):
        return [_without(part, paths) for part in value]
    gone = {path[0] for path in paths if len(path) == 1}
    return {
        key: _without(part, {path[1:] for path in paths if path[0] == key and len(path) > 1})
        for key, part in value.items()
        if key not in gone
    }


def owned_alike(one: Raw, other: Raw) -> bool:
    """Whether two children belong to runs of one name; that of an earlier run is on its way out, or ours soon."""
    first, second = owner(one), owner(other)
    return first is not None and second is not None and first[0] == second[0]


def _key(obj: Raw) -> Key:
    return Key(obj["metadata"]["namespace"], obj["metadata"]["name"])


def _reason(error: ApiError) -> str:
    if "exceeded quota" in error.message:
        return "QuotaExceeded"
    return "NameTaken" if error.status == 409 else f"{error.reason or 'Invalid'}Child"

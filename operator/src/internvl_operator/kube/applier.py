"""Carry out a plan: children, then status, then deletions; write only what differs.

The order makes a crash harmless. Children come first: their names and labels tell which attempt they belong to. Status
comes before deletions, so that a counted end is recorded before its evidence is deleted.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from typing import Any, TypeVar

from internvl_api.constants import API_VERSION, KIND, LABEL_STAGE
from internvl_api.status import InternVLFineTuneStatus

from internvl_operator.core.observe import Pod, owner
from internvl_operator.core.plan import Plan, Ref
from internvl_operator.core.policies.refused_child import refusal_reason
from internvl_operator.core.run import Key, Run
from internvl_operator.kube.cache import Collection, RunCache, contains, slim
from internvl_operator.kube.client import Api, ApiError, resource_of
from internvl_operator.kube.name_conflicts import NameConflicts, Refused

Raw = dict[str, Any]
T = TypeVar("T")
logger = logging.getLogger(__name__)
_ALONE = 2  # up to this many requests, threads are slower


class Applier:
    """Write through `api` and put the answers into the caches, so that the next pass sees its own writes."""

    def __init__(
        self,
        api: Api,
        runs: RunCache,
        children: Mapping[str, Collection[Any]],
        executor: Executor,
    ) -> None:
        """`children`: by resource, as `resource_of` names it."""
        self._api, self._runs, self._children, self._executor = api, runs, children, executor
        self._conflicts = NameConflicts(api, children)
        # The last status sent, by uid, where the stored one differs: a server with an older CRD prunes unknown fields,
        # and each pass would send them again.
        self._asked: dict[str, Raw] = {}
        self._undeclared: set[tuple[str, ...]] = set()  # status fields that the installed CRD lacks

    def carry_out(self, run: Run, plan: Plan) -> int:
        """The number of pods created.

        Raises Refused for a refused child, Adopted when the plan is out of date because orphans belong to the run now,
        and ApiError for anything else.
        """
        missing = [obj for obj in plan.apply if not self._there(obj)]
        shared = [obj for obj in missing if obj["kind"] != "Pod"]
        pods = [obj for obj in missing if obj["kind"] == "Pod"]
        # An apply would merge into a foreign object. Pods are immutable: the server refuses theirs.
        self._conflicts.check(run, [obj for obj in shared if self._own(obj) is None])
        for obj in shared:  # first: a pod cannot start without its ConfigMap
            self._apply(run, obj)
        self._each(lambda obj: self._apply(run, obj), pods)
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
        """Write the status if it differs; True when it was written."""
        wanted = _without(status.to_dict(), self._undeclared)
        if wanted in (run.raw_status, self._asked.get(run.uid)):
            return False
        obj = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            # The version makes the server refuse (409) a status meant for an earlier run of this name, as the uid is
            # ignored. A run that was edited meanwhile is refused too, and has another pass.
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
        """Write the status, without the fields for which the server of an older CRD refuses it."""
        try:
            return self._api.apply_status(obj)
        except ApiError as error:
            _, *path = error.undeclared or ("",)
            if not path or tuple(path) in self._undeclared:
                raise
            logger.warning(
                "the installed CRD is older than this operator and lacks status.%s; update the CRD", ".".join(path)
            )
            self._undeclared.add(tuple(path))
        return self._apply_status(obj | {"status": _without(obj["status"], self._undeclared)})

    def forget(self, uid: str) -> None:
        """Drop what is kept for a deleted run."""
        self._asked.pop(uid, None)

    def _there(self, obj: Raw) -> bool:
        found = self._own(obj)
        if found is None or obj["kind"] == "Pod":  # pods are immutable: an existing one is as it was created
            return found is not None
        wanted = slim(obj)
        omitted = ("apiVersion", "kind")  # by lists
        return contains(found, {key: value for key, value in wanted.items() if key not in omitted})

    def _own(self, obj: Raw) -> Any:
        """The cached child of this name, if this run owns it; another run's child is never taken for ours."""
        found = self._children[resource_of(obj)].get(_key(obj))
        return found if found is not None and _owner_uid(found) == _owner_uid(obj) else None

    def _apply(self, run: Run, obj: Raw) -> None:
        try:
            # Force only for our own children: an object we have not seen may belong to somebody else.
            answer = self._api.apply(obj, force=self._own(obj) is not None)
            self._children[resource_of(obj)].answered(answer)
        except ApiError as error:
            name = f"{obj['kind']} {obj['metadata']['name']}"
            if error.unknown_kind:
                version = obj["apiVersion"]
                text = f"spec.scheduling.gang: the cluster does not serve {name} ({version}); is its CRD installed?"
                raise Refused("GangNotEnabled", text) from error
            if error.refused:
                if obj["kind"] == "Pod":
                    self._conflicts.check(run, [obj])
                stage = obj["metadata"]["labels"].get(LABEL_STAGE) if obj["kind"] == "Pod" else None
                problem = error.status, error.reason, error.message
                raise Refused(*refusal_reason(name, stage, obj["metadata"]["namespace"], *problem)) from error
            raise

    def _delete(self, run: Run, ref: Ref) -> None:
        try:
            answer = self._api.delete(ref.kind, run.namespace, ref.name, uid=ref.uid, force=ref.force, grace=ref.grace)
        except ApiError as error:
            if error.status not in (404, 409):  # already deleted, or the name belongs to a new object
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
            futures = [self._executor.submit(act, item) for item in todo]
            errors = [error for future in futures if (error := future.exception())]  # after all have ended
            if errors:
                raise errors[0]


def _without(value: Any, paths: set[tuple[str, ...]]) -> Any:
    """A status without the fields at these paths; a path has no step for a list."""
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


def _owner_uid(child: Pod | Raw) -> str | None:
    if isinstance(child, Pod):
        return child.owner_uid
    found = owner(child)
    return found[1] if found else None


def _key(obj: Raw) -> Key:
    return Key(obj["metadata"]["namespace"], obj["metadata"]["name"])

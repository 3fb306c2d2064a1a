"""Find objects that hold the names of a run's children; report all of them, or adopt orphans if the user asks."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from internvl_api.constants import LABEL_MANAGED_BY, MANAGED_BY

from internvl_operator.core.observe import owner, read_pod
from internvl_operator.core.resources import orphans
from internvl_operator.core.resources.orphans import Child
from internvl_operator.core.run import Run
from internvl_operator.kube.cache import Collection
from internvl_operator.kube.client import Api, ApiError, list_path, resource_of

Raw = dict[str, Any]


class Refused(Exception):
    """The API server refuses a child; `reason` is for a condition."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class Adopted(Exception):
    """The run owns orphaned children now; the next pass sees them as its own."""


class NameConflicts:
    """Finds objects of other owners under the names of our children; informers cannot see all of them."""

    def __init__(self, api: Api, children: Mapping[str, Collection[Any]]) -> None:
        self._api, self._children = api, children

    def check(self, run: Run, objs: Sequence[Raw]) -> None:
        """Return when every name is free, or held by a child of an earlier run of this name that is being deleted.

        Raises Adopted when orphans were adopted, else Refused with every conflict.
        """
        found = [(obj, self._api.find(resource_of(obj), run.namespace, obj["metadata"]["name"])) for obj in objs]
        taken = [Child(resource_of(obj), raw) for obj, raw in found if raw is not None and not owned_alike(raw, obj)]
        if taken:
            self._resolve(run, taken)
        unread = [
            raw["metadata"]["name"] for obj, raw in found if raw and obj["kind"] == "Pod" and _unreadable(run, raw)
        ]
        if unread:
            names = ", ".join(unread)
            text = f"Pod {names} belongs to the run, but somebody has changed its labels"
            command = f"kubectl delete pod -n {run.namespace} {' '.join(unread)}"
            raise Refused("NameTaken", f"{text}; the operator no longer recognises it. Delete it: {command}")

    def _resolve(self, run: Run, taken: Sequence[Child]) -> NoReturn:
        left = [Child(kind, raw) for kind in self._children for raw in self._orphans(run, kind)]
        conflict = orphans.conflict(run, taken, left)
        if left and run.adopt and orphans.same_output(run, left):
            try:
                for child in sorted(left, key=lambda child: child.kind == "Pod"):  # pods last: they alone are deleted
                    self._adopt(run, child)
            except ApiError as error:
                if error.refused:
                    text = f"{conflict}; the API server refuses adoption, so delete them: {error.message}"
                    raise Refused("NameTaken", text) from error
                raise
            raise Adopted(f"adopted {len(left)} orphaned children of an earlier run {run.name!r}")
        raise Refused("NameTaken", conflict)

    def _adopt(self, run: Run, child: Child) -> None:
        try:
            answer = self._api.patch(child.kind, run.namespace, child.name, orphans.adoption(run, child.raw))
        except ApiError as error:
            if error.status not in (404, 409):  # deleted or changed meanwhile: the next pass looks again
                raise
        else:
            self._children[child.kind].answered(answer)

    def _orphans(self, run: Run, kind: str) -> list[Raw]:
        try:
            pages = [*self._api.list_pages(list_path(kind, run.namespace), selector=orphans.selector(run))]
        except ApiError as error:
            if error.status == 404:  # of a PodGroup whose CRD is not installed
                return []
            raise
        return [raw for page in pages for raw in page["items"] if orphans.is_orphan(raw)]


def _unreadable(run: Run, raw: Raw) -> bool:
    """Whether a pod of this very run is unknown to the informer, which selects by label, or cannot be read."""
    labels = raw["metadata"].get("labels") or {}
    mine = owner(raw) == (run.name, run.uid)
    return mine and (labels.get(LABEL_MANAGED_BY) != MANAGED_BY or read_pod(raw) is None)


def owned_alike(one: Raw, other: Raw) -> bool:
    """Whether two children belong to runs of the same name, such as an earlier run whose children are being deleted."""
    first, second = owner(one), owner(other)
    return first is not None and second is not None and first[0] == second[0]

"""Read and write the Lease that names the leading replica."""

from typing import Any, NamedTuple

from internvl_operator.clock import utc_now
from internvl_operator.kube.client import Api, ApiError, list_path, object_path

Raw = dict[str, Any]
KIND = "Lease"


class Record(NamedTuple):
    """The content of a Lease. `version` changes with every write."""

    holder: str
    seconds: float
    version: str
    raw: Raw


class LeaseClient:
    """One Lease. Raises ApiError; 409 when another replica wrote first."""

    def __init__(self, api: Api, namespace: str, name: str) -> None:
        self._api, self._namespace, self._name = api, namespace, name

    def get(self, timeout: float) -> Record | None:
        """The current record; None when the Lease does not exist yet."""
        try:
            return _read(self._api.lease("GET", object_path(KIND, self._namespace, self._name), None, timeout))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def write(self, before: Record | None, holder: str, seconds: float, timeout: float) -> Record:
        """Set the holder (empty: nobody) if the Lease has not changed since `before`. Raises ApiError."""
        now = utc_now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec: Raw = dict(before.raw["spec"]) if before else {}
        if before is None or before.holder != holder:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = spec.get("leaseTransitions", 0) + (1 if before else 0)
        # These times are for people; no replica compares them with its clock.
        spec |= {"holderIdentity": holder, "leaseDurationSeconds": max(1, round(seconds)), "renewTime": now}
        metadata: Raw = {"name": self._name, "namespace": self._namespace}
        if before:
            metadata["resourceVersion"] = before.version
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": KIND, "metadata": metadata, "spec": spec}
        if before:
            path = object_path(KIND, self._namespace, self._name)
            return _read(self._api.lease("PUT", path, body, timeout))
        return _read(self._api.lease("POST", list_path(KIND, self._namespace), body, timeout))


def _read(raw: Raw) -> Record:
    spec = raw.get("spec") or {}
    return Record(
        holder=spec.get("holderIdentity") or "",
        seconds=float(spec.get("leaseDurationSeconds") or 0),
        version=raw["metadata"]["resourceVersion"],
        raw={**raw, "spec": spec},
    )

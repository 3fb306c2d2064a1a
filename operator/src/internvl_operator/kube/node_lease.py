"""Read the Lease that a node's kubelet renews."""

import logging

from internvl_operator.kube.client import Api, ApiError, object_path

NAMESPACE = "kube-node-lease"
_SECONDS = 40  # leaseDurationSeconds of kubelets by default
_SHARE = 4  # a kubelet renews its Lease four times in that time
_TIMEOUT = 5.0

logger = logging.getLogger(__name__)


def read_renewal(api: Api, node: str) -> tuple[str, float] | None:
    """A value that changes with each renewal, and seconds between two; None when the Lease cannot be read."""
    try:
        lease = api.lease("GET", object_path("Lease", NAMESPACE, node), None, _TIMEOUT)
    except ApiError as error:
        logger.debug("cannot read the Lease of node %s: %s", node, error)
        return None
    spec = lease.get("spec") or {}
    value, duration = spec.get("renewTime"), spec.get("leaseDurationSeconds")
    if not isinstance(value, str):
        return None
    return value, (min(max(duration, _SECONDS), 3600) if isinstance(duration, int) else _SECONDS) / _SHARE

"""Pods whose trainer has exited while another container still runs, such as an injected proxy.

Such a pod keeps its requests, GPUs included, and its phase stays Running.
"""

from datetime import datetime

from internvl_operator.core.observe import Pod

# Seconds; Kubernetes' default termination grace period. Native sidecars end by themselves within it, and the pod with
# its logs is kept.
GRACE = 30.0


def seconds_left(pod: Pod, now: datetime) -> float | None:
    """Seconds until the pod is deleted for its other containers; None when no other container runs."""
    if not pod.finished or not pod.active:
        return None
    return 0.0 if pod.finished_at is None else GRACE - (now - pod.finished_at).total_seconds()

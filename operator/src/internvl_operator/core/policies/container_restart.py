"""Detect containers restarted in place by their node, as by a node that comes back with an empty disk.

restartPolicy: Never does not prevent it: that node's kubelet has no record of the first container. The new process
would wait at a rendezvous that is over, and its peers for answers of the first process.
"""

from collections.abc import Sequence

from internvl_operator.core.context import ReconcileContext
from internvl_operator.core.observe import Pod
from internvl_operator.core.policies.outcome import Outcome

_ID_SUFFIX = 8  # last characters of a container's id: enough to tell two apart


def containers(workers: Sequence[Pod], size: int) -> list[str]:
    """Container ids of a group of `size` workers by rank, as status records them; empty until all of them run."""
    ids = [_short(pod) for pod in sorted(workers, key=lambda pod: pod.rank)]
    return ids if len(ids) == size and all(ids) else []


def restarted_in_place(context: ReconcileContext) -> Outcome | None:
    """A retry when a container is not the one that joined the rendezvous; None otherwise, and for a single worker."""
    pod = restarted_pod(context)
    if pod is None:
        return None
    who = f"worker {pod.rank} (pod {pod.name})"
    text = f"{who}: node {pod.node} restarted its container in place, without its peers"
    return Outcome("retry", "NodeLost", text, "infrastructure")


def restarted_pod(context: ReconcileContext) -> Pod | None:
    """The first worker whose container is not the one that joined the rendezvous; None when there is none."""
    known = context.status.containers
    if len(known) < 2:
        return None
    return next(
        (pod for pod in context.workers if _short(pod) and [_short(pod)] != known[pod.rank : pod.rank + 1]), None
    )


def _short(pod: Pod) -> str:
    return pod.container_id[-_ID_SUFFIX:]

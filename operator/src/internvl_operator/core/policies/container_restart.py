"""Detect containers restarted in place by their node, as by a node that comes back with an empty disk.

restartPolicy: Never does not prevent it, because that kubelet has no record of what ran before. The new process would
wait at a rendezvous that is over, and its peers for answers of the old process.
"""

from internvl_operator.core.context import ReconcileContext
from internvl_operator.core.observe import Pod
from internvl_operator.core.policies.failure_policy import Outcome

_ID_SUFFIX = 8  # last characters of a container's id, to tell one from another


def remember(context: ReconcileContext, size: int) -> None:
    """Record the container ids of a group of `size` workers in status, once all of them run."""
    if not context.status.containers and len(context.workers) == size and all(map(_short, context.workers)):
        context.status.containers = [_short(pod) for pod in sorted(context.workers, key=lambda pod: pod.rank)]


def restarted_in_place(context: ReconcileContext) -> Outcome | None:
    """A retry when a container is not the one that joined the rendezvous; None otherwise, and for a single worker."""
    known = context.status.containers
    if len(known) < 2:
        return None
    for pod in context.workers:
        if _short(pod) and [_short(pod)] != known[pod.rank : pod.rank + 1]:
            who = f"worker {pod.rank} (pod {pod.name})"
            text = f"{who}: node {pod.node} restarted its container in place, without its peers"
            return Outcome("retry", "NodeLost", text, "infrastructure")
    return None


def _short(pod: Pod) -> str:
    return pod.container_id[-_ID_SUFFIX:]

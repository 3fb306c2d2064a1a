"""Remember the nodes whose failure ended attempts of a run, and avoid a node that has failed twice.

A node with broken hardware often comes back, gets the next pods because it is empty, and fails again. Orderly
shutdowns, drains and evictions do not count as failures of a node.
"""

from collections.abc import Sequence

from internvl_api.status import InternVLFineTuneStatus

from internvl_operator.core.observe import Pod
from internvl_operator.core.policies import failure_policy

_REASONS = ("NodeLost", "NodeRefused", "NodeTainted")
_TOLERATED = 1  # failures; a node that fails more often is avoided
_REMEMBERED = 64  # nodes in status
# Seconds that pods wait for a node that is not avoided; after that the avoided ones are allowed again.
PATIENCE = 60


def counted(status: InternVLFineTuneStatus, workers: Sequence[Pod], restarted: Pod | None) -> dict[str, int]:
    """Failures by node, including those that ended the current attempt; `restarted`: a worker restarted in place."""
    failures = dict(status.node_failures)
    failed = {pod.node for pod in workers if pod is restarted or _is_failure(pod)}
    for node in sorted(node for node in failed if node):
        if node in failures or len(failures) < _REMEMBERED:
            failures[node] = failures.get(node, 0) + 1
    return failures


def avoided(status: InternVLFineTuneStatus) -> list[str]:
    """The nodes that new pods must not run on, sorted."""
    return sorted(node for node, count in status.node_failures.items() if count > _TOLERATED)


def allowed_again(status: InternVLFineTuneStatus) -> dict[str, int]:
    """Failures by node that allow every node again; one more failure of a node makes the run avoid it again."""
    return {node: min(count, _TOLERATED) for node, count in status.node_failures.items()}


def _is_failure(pod: Pod) -> bool:
    found = failure_policy.diagnose(pod)
    return found is not None and found.reason in _REASONS

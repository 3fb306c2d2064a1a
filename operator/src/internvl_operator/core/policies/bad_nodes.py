"""Remember the nodes whose failure ended attempts of a run, and avoid a node that is broken or has failed twice.

A node with broken hardware often comes back, gets the next pods because it is empty, and fails again. An error of the
GPU's hardware counts twice. Orderly shutdowns, drains and evictions do not count as failures of a node.
"""

from collections.abc import Sequence

from internvl_api import faults
from internvl_api.status import InternVLFineTuneStatus

from internvl_operator.core.observe import Pod
from internvl_operator.core.policies import failure_policy

_REASONS = ("NodeLost", "NodeRefused", "NodeTainted", *faults.blamed("node"))
_BROKEN = faults.blamed("hardware")
_TOLERATED = 1  # failures; a node that fails more often is avoided
AVOIDED = "failed twice under this run, has a broken GPU, or is gone"  # why, in messages
_REMEMBERED = 64  # nodes in status
# Seconds that pods wait for a node that is not avoided; after that the avoided ones are allowed again.
PATIENCE = 60


def counted(status: InternVLFineTuneStatus, workers: Sequence[Pod], restarted: Pod | None) -> dict[str, int]:
    """Failures by node, including those that ended the current attempt; `restarted`: a worker restarted in place."""
    failures, ended = dict(status.node_failures), dict[str, int]()
    for pod in workers:
        if pod.node and (weight := _weight(pod, restarted)):
            ended[pod.node] = max(weight, ended.get(pod.node, 0))
    for node, weight in sorted(ended.items()):
        failures = with_failure(failures, node, weight)
    return failures


def avoided(status: InternVLFineTuneStatus) -> list[str]:
    """The nodes that new pods must not run on, sorted."""
    failed = {node for node, count in status.node_failures.items() if count > _TOLERATED}
    return sorted(failed | {*status.lost_nodes})


def with_failure(failures: dict[str, int], node: str, weight: int = 1) -> dict[str, int]:
    """The failures by node, with one more of this node, or one that counts for several."""
    if node not in failures and len(failures) >= _REMEMBERED:
        return failures
    return failures | {node: failures.get(node, 0) + weight}


def allowed_again(status: InternVLFineTuneStatus) -> dict[str, int]:
    """Failures by node that allow every node again; one more failure of a node makes the run avoid it again."""
    return {node: min(count, _TOLERATED) for node, count in status.node_failures.items()}


def _weight(pod: Pod, restarted: Pod | None) -> int:
    """How many failures of its node the end of a worker counts for."""
    found = failure_policy.diagnose(pod)
    if found is not None and found.reason in _BROKEN:
        return _TOLERATED + 1
    return int(pod is restarted or (found is not None and found.reason in _REASONS))

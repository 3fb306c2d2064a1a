"""Workers that their node forgot and started anew, in the same pods: as a node does that comes back with an empty disk.

restartPolicy Never does not keep a kubelet from it, which knows nothing of what ran before. The new process would wait
for its peers at a meeting that is over, and they for answers of the old one.
"""

from internvl_operator.core.context import Draft
from internvl_operator.core.observe import Pod
from internvl_operator.core.policies.failure_policy import Outcome

_ENOUGH = 8  # last characters of a container's id, to tell one from another


def note(draft: Draft, size: int) -> None:
    """Remember the containers of a group of `size`, as soon as all of them run."""
    if not draft.status.containers and len(draft.members) == size and all(map(_short, draft.members)):
        draft.status.containers = [_short(pod) for pod in sorted(draft.members, key=lambda pod: pod.rank)]


def started_anew(draft: Draft) -> Outcome | None:
    """The end of a group some of whose containers are not those that met. A worker without peers may just go on."""
    known = draft.status.containers
    if len(known) < 2:
        return None
    for pod in draft.members:
        if _short(pod) and [_short(pod)] != known[pod.rank : pod.rank + 1]:
            text = f"worker {pod.rank} (pod {pod.name}): node {pod.node} forgot it, and started it anew and alone"
            return Outcome("retry", "NodeLost", text, "infrastructure")
    return None


def _short(pod: Pod) -> str:
    return pod.container_id[-_ENOUGH:]

"""Recognise workers whose node is gone before Kubernetes calls it NotReady, which takes about a minute.

A worker is lost when three things come together. Its group has a problem: training makes no step, a peer reports a lost
peer, or the attempt has ended and its pods do not go. Its kubelet has missed a renewal of the node's Lease. And the
worker itself has not answered /progress since. A kubelet that restarts, a slow step, or a failed network between the
operator and the pods is not enough.

The pod of a lost worker is deleted by force although it may still run. That is safe only where nothing that it writes
can count: the output's lease is taken over by the next attempt (docs/reliability.md), so the output must be in object
storage, and the pod must have no other volume that several nodes can write to.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime

from internvl_api.address import OBJECT_STORES
from internvl_api.pipeline import PARALLEL_STAGES
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.status import InternVLFineTuneStatus

from internvl_operator.core.observe import Pod, Silence
from internvl_operator.core.policies import failure_policy
from internvl_operator.core.policies.outcome import Outcome
from internvl_operator.core.run import Run
from internvl_operator.core.timestamps import from_text

MISSED = 1.5  # renewals of its node's Lease; a kubelet renews it every 10 s by default
STALLED = 5.0  # seconds without a step, after which the workers' nodes are watched
# Kinds of volumes that are of one node or read-only.
_LOCAL = ("configMap", "downwardAPI", "emptyDir", "hostPath", "projected", "secret")


def is_silent(silence: Silence | None) -> bool:
    """Whether a worker and its node have been silent for long enough."""
    return silence is not None and silence.seconds >= MISSED * silence.renewal


def lost(run: Run, pods: Sequence[Pod], silences: Mapping[str, Silence]) -> frozenset[str]:
    """The uids of the lost workers whose pods may be deleted by force.

    Empty while the run is suspended, because no next attempt takes over the output's lease.
    """
    if run.resolved.spec is None or run.run_policy.suspend or not is_fenced(run.resolved.spec):
        return frozenset()
    return frozenset(pod.uid for pod in pods if _may_be_lost(pod) and is_silent(silences.get(pod.uid)))


def is_fenced(spec: InternVLFineTuneSpec) -> bool:
    """Whether writes of a pod of an ended attempt do no harm: they go to object storage, or to no shared volume."""
    return spec.output.startswith(OBJECT_STORES) and all(
        bool(volume.get("persistentVolumeClaim", {}).get("readOnly")) or any(kind in volume for kind in _LOCAL)
        for volume in spec.pod_template.volumes
    )


def outcome(workers: Sequence[Pod], uids: frozenset[str]) -> Outcome | None:
    """The end of an attempt that has lost a worker; else None."""
    pod = next((pod for pod in workers if pod.uid in uids), None)
    if pod is None:
        return None
    text = (
        f"worker {pod.rank} (pod {pod.name}) is lost: the kubelet of node {pod.node} does not renew the node's Lease, "
        "and the worker does not answer"
    )
    return Outcome("retry", "NodeLost", text, "infrastructure")


def suspects(
    workers: Sequence[Pod], old: Sequence[Pod], status: InternVLFineTuneStatus, now: datetime
) -> tuple[Pod, ...]:
    """Pods whose nodes the operator watches: those of an ended attempt, and the workers of a group with a problem."""
    seen = [*old]
    if _stalls(status, now) or any(_reports_lost_peer(pod) for pod in workers):
        seen += [pod for pod in workers if pod.running]
    return tuple(pod for pod in seen if _may_be_lost(pod))


def seconds_to_suspect(status: InternVLFineTuneStatus, now: datetime) -> float | None:
    """Seconds until training that makes no step is suspect; None when it is already, or does not report steps."""
    since = from_text(status.progress_at)
    left = STALLED - (now - since).total_seconds() if since else 0.0
    return left if left > 0 else None


def _stalls(status: InternVLFineTuneStatus, now: datetime) -> bool:
    return status.progress_at is not None and seconds_to_suspect(status, now) is None


def _reports_lost_peer(pod: Pod) -> bool:
    found = failure_policy.diagnose(pod)
    return found is not None and found.secondary


def _may_be_lost(pod: Pod) -> bool:
    """Whether the pod's node may be lost. Only pods of parallel stages: others may write outside of the output."""
    return pod.stage in PARALLEL_STAGES and pod.node is not None and pod.active and not pod.finished

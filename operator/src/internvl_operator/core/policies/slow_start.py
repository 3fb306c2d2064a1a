"""Pods that have a node and take long to start: what they still wait for, by the kubelet's own account.

A kubelet mounts a pod's volumes, makes its sandbox with its network, and then the condition PodReadyToStartContainers
is True; after that it pulls images. `ContainerCreating` is all that the container says of either. Why a volume is not
there, only the kubelet's events tell, which the operator may not read: the message names what could be missing.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

from internvl_api.spec import InternVLFineTuneSpec

from internvl_operator.core.observe import Pod
from internvl_operator.core.policies.startup_problems import Trouble
from internvl_operator.core.resources.pods import claims
from internvl_operator.core.timestamps import to_text

NOTICE_AFTER = timedelta(seconds=30)  # most pods start sooner: nothing is written about those
_SILENT = ("", "ContainerCreating", "PodInitializing")
_KINDS = {  # of a volume's source -> what it is called, and the field with its name
    "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
    "secret": ("Secret", "secretName"),
    "configMap": ("ConfigMap", "name"),
}


def slow_start(members: Sequence[Pod], spec: InternVLFineTuneSpec, now: datetime) -> Trouble | None:
    """The first pod that takes long; those without a sandbox come first."""
    slow = [pod for pod, since in _starting(members) if now - since >= NOTICE_AFTER]
    for pod in sorted(slow, key=lambda pod: bool(pod.sandbox)):
        if words := what_is_missing(pod, spec):
            reason = "ImagePulling" if pod.sandbox else "SandboxNotReady"
            since = to_text(pod.accepted_at) if pod.accepted_at else ""
            return Trouble(reason, f"pod {pod.name} on node {pod.node} waits since {since}: {words}", stalled=False)
    return None


def first_look(members: Sequence[Pod], now: datetime) -> float | None:
    """Seconds until the next pod has taken long."""
    left = [(since + NOTICE_AFTER - now).total_seconds() for _, since in _starting(members)]
    return min((seconds for seconds in left if seconds > 0), default=None)


def _starting(members: Sequence[Pod]) -> Iterator[tuple[Pod, datetime]]:
    """Those that a kubelet has accepted, and since when; a container that says what is wrong is not waited for."""
    for pod in members:
        waits = pod.phase == "Pending" and not pod.finished and pod.waiting_reason in _SILENT
        if waits and pod.accepted_at is not None:
            yield pod, pod.accepted_at


def what_is_missing(pod: Pod, spec: InternVLFineTuneSpec) -> str:
    """In words; empty where the kubelet says nothing of it."""
    if pod.sandbox is None:
        return ""
    if pod.sandbox:
        return "its volumes and network are ready, its image is still being pulled"
    mounted = ", ".join(_mounted(spec))
    what = f"; it mounts {mounted}: do they exist?" if mounted else ""
    said = f" ({pod.sandbox_message})" if pod.sandbox_message else ""
    return f"its volumes or its network are not ready{said}{what}; `kubectl describe pod {pod.name}` has the reason"


def _mounted(spec: InternVLFineTuneSpec) -> Iterator[str]:
    """What users' volumes refer to."""
    yield from (f"PersistentVolumeClaim {claim}" for claim in claims(spec))
    for volume in spec.pod_template.volumes:
        for source, (kind, field) in _KINDS.items():
            found = volume.get(source)
            if isinstance(found, dict) and isinstance(name := found.get(field), str):
                yield f"{kind} {name}"

"""Why the pods of a group do not run yet: Secrets, images, scheduling, and slow starts.

A kubelet mounts a pod's volumes and creates its sandbox with its network, then sets PodReadyToStartContainers to True,
then pulls images. The container reports only `ContainerCreating` during both. The cause of a missing volume is only in
the kubelet's events, which the operator may not read, so the message names what may be missing.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from internvl_api.spec import InternVLFineTuneSpec, Secrets

from internvl_operator.core.observe import OtherContainer, Pod
from internvl_operator.core.resources.pods import claims, image_setting
from internvl_operator.core.timestamps import to_text

NOTICE_AFTER = timedelta(seconds=30)  # most pods start sooner and need no message
_SILENT = ("", "ContainerCreating", "PodInitializing")
_NOT_OURS = "which is not the trainer's (an admission webhook or a network profile adds such containers)"
_KINDS = {  # source of a volume -> kind, and the field with its name
    "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
    "secret": ("Secret", "secretName"),
    "configMap": ("ConfigMap", "name"),
}
_NO_CLAIM = re.compile(r'persistentvolumeclaim "(?P<claim>[^"]+)" (?P<state>not found|is being deleted)')
_IMAGE_REASONS = {
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
    "RegistryUnavailable",
}  # fmt: skip


@dataclass(frozen=True)
class StartupProblem:
    """Why a group does not run yet. `stalled`: only the user can fix it."""

    reason: str
    message: str
    stalled: bool


def startup_problem(workers: Sequence[Pod], spec: InternVLFineTuneSpec, namespace: str) -> StartupProblem | None:
    """The problem that keeps a worker from starting; problems that only the user can fix come first."""
    found = [problem for pod in workers if (problem := _problem_of(pod, spec, namespace)) is not None]
    return min(found, key=lambda problem: not problem.stalled, default=None)


def _problem_of(pod: Pod, spec: InternVLFineTuneSpec, namespace: str) -> StartupProblem | None:
    if pod.finished:
        return None
    if pod.waiting_reason == "CreateContainerConfigError":
        return _missing_secret(pod, spec.secrets, namespace)
    if pod.waiting_reason in _IMAGE_REASONS:
        detail = pod.waiting_message or pod.waiting_reason
        return StartupProblem(
            "ImagePullFailed", f"{image_setting(spec)}: pod {pod.name} cannot get its image: {detail}", stalled=True
        )
    if pod.waiting_reason in ("CreateContainerError", "RunContainerError"):
        return StartupProblem("ContainerNotStarted", f"pod {pod.name}: {pod.waiting_message}", stalled=True)
    if pod.unstarted and (other := next((each for each in pod.others if each.waiting_reason in _IMAGE_REASONS), None)):
        detail = other.waiting_message or other.waiting_reason
        text = f"pod {pod.name} cannot get the image of its {other.describe()}, {_NOT_OURS}: {detail}"
        return StartupProblem("OtherContainerBlocked", text, stalled=True)
    if pod.scheduling_gated:
        return StartupProblem(
            "SchedulingGated", f"pod {pod.name} waits for its queue: {pod.scheduling_gated}", stalled=False
        )
    if found := _NO_CLAIM.search(pod.unschedulable):
        return _missing_claim(found["claim"], found["state"], spec, namespace)
    if pod.unschedulable:
        return StartupProblem("Unschedulable", f"pod {pod.name} finds no node: {pod.unschedulable}", stalled=False)
    return None


def _missing_claim(claim: str, state: str, spec: InternVLFineTuneSpec, namespace: str) -> StartupProblem:
    """A problem that only the user can fix: the scheduler would wait for the claim as it waits for nodes."""
    fields = [field for field, source in spec.sources() if f"{source}/".startswith(f"pvc://{claim}/")]
    fields += [
        f"spec.podTemplate.volumes[{index}]"
        for index, volume in enumerate(spec.pod_template.volumes)
        if ("PersistentVolumeClaim", claim) in _objects(volume)
    ]
    field = fields[0] if fields else "spec.podTemplate.volumes"
    text = (
        f"{field}: PersistentVolumeClaim {claim!r} of namespace {namespace!r} {state}; create it there, or name "
        "another; the run then continues by itself"
    )
    return StartupProblem("ClaimMissing", text, stalled=True)


def _missing_secret(pod: Pod, secrets: Secrets, namespace: str) -> StartupProblem:
    message = pod.waiting_message
    if "secret" not in message.lower():
        return StartupProblem("InvalidPodConfig", f"pod {pod.name}: {message}", stalled=True)
    named = {
        "spec.secrets.objectStorage": secrets.object_storage,
        "spec.secrets.huggingFace": secrets.hugging_face,
        "spec.secrets.tracking": secrets.tracking,
    }
    for field, name in named.items():
        if name is not None and f'"{name}"' in message:
            text = (
                f"{field}: found no Secret {name!r} in namespace {namespace!r}; create it there, or name another; "
                "the run then continues by itself"
            )
            return StartupProblem("SecretMissing", text, stalled=True)
        if name is not None and message.endswith(f"/{name}"):  # "couldn't find key KEY in Secret NAMESPACE/NAME"
            text = f"{field}: {message}; add the key; the run then continues by itself"
            return StartupProblem("SecretMissing", text, stalled=True)
    return StartupProblem(
        "SecretMissing", f"spec.podTemplate: {message}; create it, and the run continues by itself", stalled=True
    )


def slow_start(workers: Sequence[Pod], spec: InternVLFineTuneSpec, now: datetime) -> StartupProblem | None:
    """The problem of the first pod that starts slowly; pods without a sandbox come first."""
    slow = [(pod, since) for pod, since in _starting(workers) if now - since >= NOTICE_AFTER]
    for pod, since in sorted(slow, key=lambda each: bool(each[0].ready_to_start)):
        if pod.ready_to_start is None:  # its kubelet does not report it
            continue
        who, start = f"pod {pod.name} on node {pod.node}", to_text(since)
        if init := _unfinished_init(pod):
            text = f"{who} has been waiting for its {init.describe()} since {start}, {_NOT_OURS}"
            return StartupProblem("OtherContainerBlocked", text, stalled=False)
        if pod.ready_to_start:
            text = f"{who} has been pulling its image since {start}; volumes and network are ready"
            return StartupProblem("ImagePulling", text, stalled=False)
        text = f"{who} has had no volumes or network since {start}{_next_step(pod, spec)}"
        return StartupProblem("SandboxNotReady", text, stalled=False)
    return None


def seconds_to_notice(workers: Sequence[Pod], now: datetime) -> float | None:
    """Seconds until the next pod counts as slow; None without a starting pod."""
    left = [(since + NOTICE_AFTER - now).total_seconds() for _, since in _starting(workers)]
    return min((seconds for seconds in left if seconds > 0), default=None)


def _starting(workers: Sequence[Pod]) -> Iterator[tuple[Pod, datetime]]:
    """Pods that start on a node, with their start time; pods whose container reports a problem are left out."""
    for pod in workers:
        waits = pod.unstarted and pod.waiting_reason in _SILENT
        if waits and pod.start_time is not None:
            yield pod, pod.start_time


def _unfinished_init(pod: Pod) -> OtherContainer | None:
    """The init container that the trainer waits for; a sidecar among them (restartPolicy Always) runs beside it."""
    return next((each for each in pod.others if each.init and each.running), None)


def missing_prerequisite(pod: Pod, spec: InternVLFineTuneSpec) -> str:
    """What a pod past its start deadline lacks; empty when the kubelet does not report it."""
    if init := _unfinished_init(pod):
        return f"its {init.describe()} has not ended, {_NOT_OURS}"
    if pod.ready_to_start is None:
        return ""
    if pod.ready_to_start:
        return "volumes and network are ready, but its image is still being pulled"
    return f"it has no volumes or network{_next_step(pod, spec)}"


def _next_step(pod: Pod, spec: InternVLFineTuneSpec) -> str:
    """The kubelet's message about the missing sandbox, and what to check."""
    *others, last = [*_mounted(spec)] or [""]
    named = f"{', '.join(others)} and {last} exist" if others else f"{last} exists"
    check = f"; check that {named}" if last else ""
    reported = f" ({pod.ready_to_start_message})" if pod.ready_to_start_message else ""
    return f"{reported}{check}; `kubectl describe pod {pod.name}` shows the reason"


def _mounted(spec: InternVLFineTuneSpec) -> Iterator[str]:
    """The objects that the volumes of the pod refer to."""
    yield from (f"PersistentVolumeClaim {claim}" for claim in claims(spec))
    yield from (f"{kind} {name}" for volume in spec.pod_template.volumes for kind, name in _objects(volume))


def _objects(volume: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(kind, name) of the object that a volume of podTemplate refers to."""
    for source, (kind, field) in _KINDS.items():
        found = volume.get(source)
        if isinstance(found, dict) and isinstance(name := found.get(field), str):
            yield kind, name

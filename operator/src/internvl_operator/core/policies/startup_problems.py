"""Why a group that was made does not run yet: secrets, images, and the scheduler's own words."""

from collections.abc import Sequence
from dataclasses import dataclass

from internvl_api.spec import Secrets

from internvl_operator.core.observe import Pod


@dataclass(frozen=True)
class Trouble:
    """Why a group that has not ended does not run; `stalled` when only the user can help."""

    reason: str
    message: str
    stalled: bool


_IMAGE_REASONS = {
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
    "RegistryUnavailable",
}  # fmt: skip


def trouble(members: Sequence[Pod], secrets: Secrets, namespace: str) -> Trouble | None:
    """The first thing that keeps a member from starting; those the user must mend come first."""
    found = [problem for pod in members if (problem := _trouble(pod, secrets, namespace)) is not None]
    return min(found, key=lambda problem: not problem.stalled, default=None)


def _trouble(pod: Pod, secrets: Secrets, namespace: str) -> Trouble | None:
    if pod.finished:
        return None
    if pod.waiting_reason == "CreateContainerConfigError":
        return _missing_secret(pod, secrets, namespace)
    if pod.waiting_reason in _IMAGE_REASONS:
        detail = pod.waiting_message or pod.waiting_reason
        return Trouble(
            "ImagePullFailed", f"spec.podTemplate.image: pod {pod.name} cannot get its image: {detail}", stalled=True
        )
    if pod.waiting_reason in ("CreateContainerError", "RunContainerError"):
        return Trouble("ContainerNotStarted", f"pod {pod.name}: {pod.waiting_message}", stalled=True)
    if pod.gated:
        return Trouble("SchedulingGated", f"pod {pod.name} waits for its queue: {pod.gated}", stalled=False)
    if pod.unschedulable:
        return Trouble("Unschedulable", f"pod {pod.name} finds no node: {pod.unschedulable}", stalled=False)
    return None


def _missing_secret(pod: Pod, secrets: Secrets, namespace: str) -> Trouble:
    message = pod.waiting_message
    if "secret" not in message.lower():
        return Trouble("InvalidPodConfig", f"pod {pod.name}: {message}", stalled=True)
    named = {"spec.secrets.objectStorage": secrets.object_storage, "spec.secrets.huggingFace": secrets.hugging_face}
    for field, name in named.items():
        if name is not None and f'"{name}"' in message:
            text = (
                f"{field}: found no Secret {name!r} in namespace {namespace!r}; create it there and the run goes on by "
                "itself, or name another"
            )
            return Trouble("SecretMissing", text, stalled=True)
    return Trouble(
        "SecretMissing", f"spec.podTemplate: {message}; create it and the run goes on by itself", stalled=True
    )

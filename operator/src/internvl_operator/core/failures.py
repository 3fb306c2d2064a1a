"""Why a group ended, and what follows: one function from its pods to one Outcome.

When one member dies its peers fail too, with errors that say nothing. So every member is diagnosed alone, and the
gravest diagnosis is the group's: a result that was weighed and refused, then a mistake only the user can mend, then the
infrastructure's doing, then a member that saved its state and left, and only then a failure of the run itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from internvl_api.constants import ExitCode
from internvl_api.spec import Secrets

from internvl_operator.core.observe import Pod

Kind = Literal["succeeded", "resume", "retry", "stall", "fail"]
Budget = Literal["user", "infrastructure", "none"]


@dataclass(frozen=True)
class Outcome:
    """What became of a group; `budget` says whose restarts it counts among."""

    kind: Kind
    reason: str
    message: str
    budget: Budget = "none"


@dataclass(frozen=True)
class Trouble:
    """Why a group that has not ended does not run; `stalled` when only the user can help."""

    reason: str
    message: str
    stalled: bool


# Only the user, or time, can mend these; a StageResult's own reason is better than the one given here.
_STALLING = {
    ExitCode.USER_ERROR: "UserError",
    ExitCode.ACCESS_DENIED: "AccessDenied",
    ExitCode.CONFIG: "InvalidRunConfig",
    ExitCode.UNAVAILABLE: "Unavailable",
}
# Pod reasons and container reasons that the kubelet or the control plane give to pods it ended itself.
_NOT_THE_RUN = {
    "Evicted", "NodeLost", "NodeShutdown", "Shutdown", "Terminated", "Preempting", "NodeAffinity", "OutOfcpu",
    "OutOfmemory", "OutOfpods", "OutOfnvidia.com/gpu", "UnexpectedAdmissionError", "ContainerStatusUnknown", "Unknown",
}  # fmt: skip
_LOST_TASK = 255  # containerd's exit code for a task that vanished with its node
_SIGNALS = {130: "SIGINT", 134: "SIGABRT", 135: "SIGBUS", 137: "SIGKILL", 139: "SIGSEGV", 143: "SIGTERM"}
_IMAGE_REASONS = {
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
    "RegistryUnavailable",
}  # fmt: skip
_GRAVITY: tuple[tuple[Kind, Budget], ...] = (
    ("fail", "none"),
    ("stall", "none"),
    ("retry", "infrastructure"),
    ("resume", "none"),
    ("retry", "user"),
)


def classify(members: Sequence[Pod], expected: int) -> Outcome | None:
    """The group's outcome, or None while it may still succeed. `expected`: members that were created."""
    found = [outcome for pod in members if (outcome := diagnose(pod)) is not None]
    missing = sorted(set(range(expected)) - {pod.rank for pod in members})
    if missing:
        found.append(_infrastructure("WorkerLost", f"worker {_listed(missing)} of {expected} disappeared"))
    for kind, budget in _GRAVITY:
        for outcome in found:
            if (outcome.kind, outcome.budget) == (kind, budget):
                return outcome
    if all(pod.succeeded for pod in members):
        return Outcome("succeeded", "Succeeded", f"{expected} of {expected} workers succeeded")
    return None


def diagnose(pod: Pod) -> Outcome | None:
    """One member alone; None while nothing is wrong with it (or it ended well)."""
    if pod.succeeded:
        return None
    who = f"worker {pod.rank} (pod {pod.name})"
    if pod.exit_code in _STALLING or pod.exit_code in (ExitCode.RESUME, ExitCode.REJECTED):
        return _exited(pod, who)
    if pod.disrupted:
        return _infrastructure("Disrupted", f"{who} was disrupted: {pod.disrupted}")
    if pod.pod_reason in _NOT_THE_RUN or pod.exit_reason in _NOT_THE_RUN:
        reason = pod.pod_reason or "NodeLost"
        return _infrastructure(_camel(reason), f"{who}: {pod.pod_message or pod.exit_reason or reason}")
    if pod.deleted_at is not None:
        return _infrastructure("WorkerDeleted", f"{who} was deleted")
    if pod.phase == "Unknown" or (pod.exit_code == _LOST_TASK and pod.result is None):
        return _infrastructure("NodeLost", f"{who} was lost with its node")
    return _exited(pod, who) if pod.finished else None


def undecided(members: Sequence[Pod], now: datetime, settle: float) -> float:
    """Seconds to go on waiting for the peers of a failed member to end, so that the real cause shows; 0: decide.

    A node's clock may be far from ours: an end that lies ahead of `now` is not waited for.
    """
    if all(pod.finished for pod in members):
        return 0.0
    ages = [
        (now - pod.exit_at).total_seconds() for pod in members if pod.finished and not pod.succeeded and pod.exit_at
    ]
    return max(0.0, settle - max(ages)) if ages and max(ages) >= 0 else 0.0


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


def _exited(pod: Pod, who: str) -> Outcome:
    result, code = pod.result, pod.exit_code
    said = result.message if result else pod.last_words
    if code in _STALLING:
        default = _STALLING[ExitCode(code)]
        return Outcome("stall", result.reason if result else default, said or f"{who}: exit code {code}")
    if code == ExitCode.REJECTED:
        return Outcome("fail", result.reason if result else "Rejected", said or f"{who}: exit code {code}")
    if code == ExitCode.RESUME:
        return Outcome("resume", "Resume", f"{who} saved its state and asks to be started again")
    if pod.exit_reason == "OOMKilled":
        return Outcome("retry", "OutOfMemory", f"{who} used more memory than its limit", "user")
    how = f"ended by {_SIGNALS[code]}" if code in _SIGNALS else f"exit code {code}" if code is not None else "failed"
    words = f"{who}: {how}" + (f": {said}" if said else "")
    return Outcome("retry", result.reason if result else "WorkerFailed", words, "user")


def _infrastructure(reason: str, message: str) -> Outcome:
    return Outcome("retry", reason, message, "infrastructure")


def _camel(reason: str) -> str:
    """A condition's reason may hold only letters and digits: OutOfnvidia.com/gpu."""
    return "".join(part[:1].upper() + part[1:] for part in reason.replace("/", ".").split("."))


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:5])
    return shown if len(ranks) <= 5 else f"{shown} and {len(ranks) - 5} more"

"""Classify how a group ended: from its pods to one Outcome. docs/runbook.md lists every reason.

When one worker dies, its peers fail with errors that explain nothing. So each worker is diagnosed alone, and the
gravest diagnosis decides, in this order: a result that only a changed spec can improve; a mistake that only the user
can fix; a batch too large for the GPU; an infrastructure failure; a worker that exceeded its disk limit; a worker that
saved its state and exited; any other failure of the run. A worker that only reports a lost peer comes last.
"""

import re
from collections.abc import Sequence
from datetime import datetime

from internvl_api import faults
from internvl_api.constants import ExitCode

from internvl_operator.core.observe import OtherContainer, Pod
from internvl_operator.core.policies.outcome import RESUME, Budget, Kind, Outcome
from internvl_operator.core.resources import requirements

_DISK_FULL = "DiskFull"
# Only the user, or time, can fix these. The reason of a StageResult replaces the one here.
_STALLING = {
    ExitCode.USER_ERROR: "UserError",
    ExitCode.ACCESS_DENIED: "AccessDenied",
    ExitCode.CONFIG: "InvalidRunConfig",
    ExitCode.UNAVAILABLE: "Unavailable",
}
# Reasons of the trainer that decide regardless of its exit code.
_SECONDARY = (*faults.blamed("peer"), "RendezvousTimeout")
_FENCED = ("OutputLeaseLost",)  # the attempt was replaced while its node could not be reached
_NOT_RETRIED = ("LossNotFinite",)  # the next attempt would compute the same
_TOO_LARGE = faults.blamed("batch")
_THE_NODE = faults.blamed("hardware", "node")  # the pod's node is broken or wrongly set up
# Reasons of the kubelet or the control plane for pods they ended -> our reasons.
_NOT_THE_RUN = {
    "Evicted": "Evicted",
    "NodeLost": "NodeLost",
    "Unknown": "NodeLost",
    "ContainerStatusUnknown": "NodeLost",
    "NodeShutdown": "NodeShutdown",
    "Shutdown": "NodeShutdown",
    "Terminated": "NodeShutdown",
    "NodeAffinity": "NodeRefused",
    "UnexpectedAdmissionError": "NodeRefused",
}
# Orderly evictions: reasons of the DisruptionTarget condition and of the pod -> our reasons.
_GAVE_WAY = {
    "PreemptionByScheduler": "Preempted",
    "EvictionByEvictionAPI": "Drained",
    "KueueEviction": "Preempted",
    "Preempting": "Preempted",
}
# Deletions that the control plane explains: reason of the DisruptionTarget condition -> our reason, and its meaning.
_ENDED_BY = {
    "DeletionByTaintManager": (
        "NodeTainted",
        "its node got a NoExecute taint that the pod does not tolerate (unreachable nodes get one)",
    ),
    "DeletionByPodGC": ("NodeLost", "its node no longer exists"),
}
# Only the message tells a pod that exceeded its own disk limits from a pod on a full node: both are Evicted.
_OWN_DISK = re.compile(r"exceeds the (total )?limit|exceeded its local ephemeral storage limit")
_NO_START = ("StartError", "ContainerCannotRun")  # the runtime found no program to start: a wrong image
_IMAGE = "spec.podTemplate.image"
_LOST_TASK = 255  # containerd's exit code for a task that was lost with its node
_ABORT = 134
_SIGNALS = {130: "SIGINT", _ABORT: "SIGABRT", 135: "SIGBUS", 137: "SIGKILL", 139: "SIGSEGV", 143: "SIGTERM"}
_GRAVITY: tuple[tuple[Kind, Budget], ...] = (
    ("fail", "none"),
    ("stall", "none"),
    ("change", "none"),
    ("retry", "infrastructure"),
    ("resume", "none"),
    ("retry", "user"),
)


def classify(workers: Sequence[Pod], expected: int, image: str = _IMAGE) -> Outcome | None:
    """The group's outcome, or None while it may still succeed. `expected`: workers that were created.

    `image`: where the pods' image is set, for messages.
    """
    found = [outcome for pod in workers if (outcome := diagnose(pod, image)) is not None]
    missing = sorted(set(range(expected)) - {pod.rank for pod in workers})
    if missing:
        found.append(_infrastructure("WorkerLost", f"worker {_listed(missing)} of {expected} disappeared"))
    if found:
        return min(found, key=_gravity)
    if all(pod.succeeded for pod in workers):
        return Outcome("succeeded", "Succeeded", f"{expected} of {expected} workers succeeded")
    return None


def diagnose(pod: Pod, image: str = _IMAGE) -> Outcome | None:
    """The outcome of one worker alone; None while it runs normally or has succeeded."""
    if pod.succeeded:
        return None
    who = f"worker {pod.rank} (pod {pod.name})"
    if pod.exit_code in _STALLING or pod.exit_code == ExitCode.REJECTED:
        return _exited(pod, who, image)
    if pod.pod_reason == "Evicted" and _OWN_DISK.search(
        pod.pod_message
    ):  # even if it saved its state: it would grow again
        return Outcome("retry", _DISK_FULL, f"{who} was evicted: {pod.pod_message}", "user")
    if pod.exit_code == ExitCode.RESUME:
        return _saved_and_left(pod, who)
    if outcome := _ended_by_control_plane(pod, who):
        return outcome
    if pod.deletion_timestamp is not None:
        return _infrastructure("WorkerDeleted", f"{who} was deleted")
    if pod.phase == "Failed" and pod.exit_code is None and (failed := _failed_init(pod)):
        text = f"{who} never started: its {failed.describe()} ended with exit code {failed.exit_code}"
        return _infrastructure("OtherContainerFailed", text + (f" ({failed.exit_words})" if failed.exit_words else ""))
    if pod.phase == "Unknown" or _lost_by_its_node(pod):
        return _infrastructure("NodeLost", f"{who} was lost with its node")
    return _exited(pod, who, image) if pod.finished else None


def _failed_init(pod: Pod) -> OtherContainer | None:
    return next((each for each in pod.others if each.init and each.exit_code), None)


def _lost_by_its_node(pod: Pod) -> bool:
    """A restarted node has no record of the container: containerd reports 255, the kubelet at first reports nothing."""
    if pod.exit_code is None:
        return pod.finished and not (pod.pod_reason or pod.exit_reason or pod.termination_message or pod.result)
    return pod.exit_code == _LOST_TASK and pod.result is None


def seconds_to_settle(workers: Sequence[Pod], now: datetime, settle: float) -> float:
    """Seconds to wait for the peers of a failed worker to end, so that the root cause shows; 0: decide now.

    A node's clock may be wrong: an end in the future causes no wait.
    """
    if all(pod.finished for pod in workers):
        return 0.0
    ages = [
        (now - pod.finished_at).total_seconds()
        for pod in workers
        if pod.finished and not pod.succeeded and pod.finished_at
    ]
    return max(0.0, settle - max(ages)) if ages and max(ages) >= 0 else 0.0


def _gravity(outcome: Outcome) -> tuple[int, int]:
    """Sort key, gravest first; a resume with a cause comes before one without."""
    if outcome.secondary:
        return len(_GRAVITY) + (outcome.reason in _SECONDARY), 0  # these reasons name a failure elsewhere
    if outcome.reason == _DISK_FULL and outcome.kind == "retry":  # its peers were asked to stop, and saved their state
        return _GRAVITY.index(("resume", "none")), 0
    return _GRAVITY.index((outcome.kind, outcome.budget)), 2 if outcome.reason == RESUME else 1


def _saved_and_left(pod: Pod, who: str) -> Outcome:
    """The outcome of exit code 75; its reason is the eviction or node failure that stopped the worker, if known."""
    reason = _disruption(pod)[0] or _node_reason(pod.pod_reason) or _ENDED_BY.get(pod.disruption_reason, (RESUME,))[0]
    if reason == RESUME:
        return Outcome("resume", reason, f"{who} saved its state and exited, to be started again")
    cause = pod.pod_message or pod.disruption_message or pod.disruption_reason or pod.pod_reason
    return Outcome("resume", reason, f"{who} saved its state and exited because of: {cause}")


def _ended_by_control_plane(pod: Pod, who: str) -> Outcome | None:
    """The outcome of a worker that the control plane or its kubelet ended with a reason; else None."""
    reason, raw = _disruption(pod)
    if reason:
        cause = ": ".join(filter(None, (raw, pod.disruption_message or pod.pod_message)))
        return Outcome("resume", reason, f"{who} was {reason.lower()}: {cause}")
    if node_reason := _node_reason(pod.pod_reason) or _node_reason(pod.exit_reason):  # more specific than the condition
        return _infrastructure(node_reason, f"{who}: {pod.pod_message or pod.pod_reason or pod.exit_reason}")
    if pod.disruption_reason:
        reason, meaning = _ENDED_BY.get(
            pod.disruption_reason, ("Disrupted", "the control plane or the kubelet ended it")
        )
        cause = ": ".join(filter(None, (pod.disruption_reason, pod.disruption_message)))
        return _infrastructure(reason, f"{who} was disrupted: {meaning} ({cause})")
    return None


def _disruption(pod: Pod) -> tuple[str, str]:
    """(`Drained` or `Preempted`, Kubernetes' reason); two empty texts for other pods."""
    raw = pod.disruption_reason if pod.disruption_reason in _GAVE_WAY else pod.pod_reason
    return (_GAVE_WAY[raw], raw) if raw in _GAVE_WAY else ("", "")


def _node_reason(reason: str) -> str | None:
    """Our reason for a node failure. OutOfcpu, OutOfnvidia.com/gpu and so on: the kubelet rejected a scheduled pod."""
    return "NodeRefused" if reason.startswith("OutOf") else _NOT_THE_RUN.get(reason)


def _exited(pod: Pod, who: str, image: str) -> Outcome:
    result, code = pod.result, pod.exit_code
    message = result.message if result else pod.termination_message
    if result and result.outcome == "failed" and (decided := _by_reason(result.reason, who, message, pod.node)):
        return decided
    if code in _STALLING:
        default = _STALLING[ExitCode(code)]
        return Outcome("stall", result.reason if result else default, message or f"{who}: exit code {code}")
    if code == ExitCode.REJECTED:
        return Outcome("fail", result.reason if result else "Rejected", message or f"{who}: exit code {code}")
    if pod.exit_reason in _NO_START:
        return Outcome("stall", "ContainerNotStarted", f"{image}: {who} could not start: {message}")
    if pod.exit_reason == "OOMKilled":
        return Outcome("retry", "OutOfMemory", f"{who} {_out_of_memory(pod)}", "user")
    ending = f"ended by {_SIGNALS[code]}" if code in _SIGNALS else f"exit code {code}" if code is not None else "failed"
    text = f"{who}: {ending}" + (f": {message}" if message else "")
    if code == _ABORT and result is None:  # NCCL's watchdog aborts a process whose peer hangs or is lost
        return Outcome("retry", "WorkerAborted", text, "infrastructure", secondary=True)
    default = "WorkerKilled" if code in _SIGNALS else "WorkerFailed"
    return Outcome("retry", result.reason if result else default, text, "user")


def _out_of_memory(pod: Pod) -> str:
    """The limit of a worker that ran out of host memory, and what to change; also true when a budget ends the run."""
    field = requirements.setting(pod.stage)
    if not pod.memory_limit:
        return f"has no memory limit, and its node ran out of memory: request what it uses in {field}.requests.memory"
    fewer = " or lower spec.training.dataWorkers" if pod.stage == "train" else ""
    return f"used more memory than its limit of {pod.memory_limit}: raise {field}.limits.memory{fewer}"


def _by_reason(reason: str, who: str, message: str, node: str | None) -> Outcome | None:
    words = f"{who}: {message}"
    if reason in _THE_NODE:
        return _infrastructure(reason, f"{who} on node {node}: {message}" if node else words)
    if reason in _SECONDARY:
        return Outcome("retry", reason, words, "infrastructure", secondary=True)
    if reason in _FENCED:
        return _infrastructure(reason, words)
    if reason in _NOT_RETRIED:
        return Outcome("fail", reason, words)
    return Outcome("change", reason, words) if reason in _TOO_LARGE else None


def _infrastructure(reason: str, message: str) -> Outcome:
    return Outcome("retry", reason, message, "infrastructure")


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:5])
    return shown if len(ranks) <= 5 else f"{shown} and {len(ranks) - 5} more"

"""Explain a run: the one reason it is not running or has failed, and the next step. Pure."""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from internvl_api.status import Condition, InternVLFineTuneStatus

from internvl_operator.core.timestamps import from_text
from internvl_operator.kubectl_ivft.humanize import ago, duration

Raw = dict[str, Any]
Tone = Literal["good", "busy", "waits", "bad"]
_LIMITS = ("BackoffLimitExceeded", "InfrastructureLimitExceeded")
_PATIENCE = 15.0  # seconds within which a running operator processes a change

# The next step for each reason whose message lacks one. {run}, {n} (-n NAMESPACE) and {stage} are filled in.
_NEXT: dict[str, str] = {
    "SecretMissing": "create that Secret, or correct its name; the run then continues by itself",
    "ClaimMissing": "create that PersistentVolumeClaim, or correct its name; the run then continues by itself",
    "ImagePullFailed": "correct the image where the message says, or set spec.podTemplate.imagePullSecrets: "
    "kubectl{n} edit ivft {run}",
    "Unschedulable": "wait for nodes, or request less (spec.workers, spec.gpusPerWorker, spec.podTemplate's resources "
    "and nodeSelector): kubectl{n} edit ivft {run}",
    "QuotaExceeded": "ask for a larger quota of the namespace, or end another run: kubectl ivft{n} list",
    "NameTaken": "delete the objects that the message names; the run then continues by itself",
    "AccessDenied": "check the keys in the Secrets that spec.secrets names, and their read and write permissions",
    "Unavailable": "wait for the storage; the run tries again by itself",
    "OutOfMemory": "change what the message names: kubectl{n} edit ivft {run}",
    "BackoffLimitExceeded": "read the log: kubectl ivft{n} logs {run} --stage {stage}{rank}; any change of the spec "
    "starts the run again with a full budget",
    "DeadlineExceeded": "raise spec.runPolicy.activeDeadlineSeconds; the run continues {start}",
    "EvaluationBelowThreshold": "read the report: kubectl ivft{n} report {run}; after you lower "
    "spec.evaluation.publishIf, the run continues without training again",
    "GpuOutOfMemory": "lower spec.training.microBatchSize (the global batch stays), or set "
    "spec.runPolicy.onOutOfMemory: halveMicroBatch: kubectl{n} edit ivft {run}",
    "LossNotFinite": "lower spec.training.learningRate or check the rows of that step; the run continues from its "
    "newest checkpoint: kubectl{n} edit ivft {run}",
    "InfrastructureLimitExceeded": "check the nodes; raise spec.runPolicy.infrastructureLimit to continue the run",
    "SchedulingDeadlineExceeded": "free nodes or request less; the run tries again by itself",
    "StartDeadlineExceeded": "fix what the message names (image, Secret or volume); the run tries again by itself",
    "ProgressStalled": "check the worker that the message names: kubectl ivft{n} logs {run} --stage {stage}",
    "SchedulingGated": "wait until the queue admits the run, or check the queue that spec.scheduling.queue names",
    "GangNotEnabled": "ask to add it to the chart's gangSchedulers, or remove spec.scheduling.gang: "
    "kubectl{n} edit ivft {run}",
    "OtherContainerBlocked": "ask whoever runs the admission webhook, or wrote the network profile, that adds that "
    "container; its state is in kubectl{n} describe pods",
    "OtherContainerFailed": "ask whoever runs the admission webhook, or wrote the network profile, that adds that "
    "container",
    "LossRises": "suspend the run (kubectl ivft{n} suspend {run}), then lower spec.training.learningRate, raise "
    "spec.training.warmupRatio, or look at the rows of those steps",
    "ApiServerError": "ask the cluster's administrator why the API server refuses writes",
}


@dataclass(frozen=True)
class Explanation:
    """A run's state in a few words, the operator's reason and message, and the next step (empty: none)."""

    tone: Tone
    state: str
    because: str
    next_step: str = ""


def explain(raw: Raw, status: InternVLFineTuneStatus, now: datetime, *, queue: str = "") -> Explanation:
    """The explanation of a raw run; `queue`: Kueue's message why it does not admit the run."""
    metadata = raw["metadata"]
    if "deletionTimestamp" in metadata:
        return Explanation("waits", "is being deleted", f"since {ago(metadata['deletionTimestamp'], now)}")
    if unseen := _unseen(raw, status, now):
        return unseen
    match status.phase:
        case "Succeeded":
            report = "read its report: kubectl ivft{n} report {run}" if "report" in status.artifacts else ""
            return Explanation("good", "has succeeded", _words(status, "Ready"), _step(report, raw))
        case "Running":
            if warning := (status.progress.warning if status.progress else None):
                words = f"{_words(status, 'Reconciling')}; {warning}"
                return Explanation("waits", "runs, with a warning", words, _after_warning(warning, raw))
            return Explanation("good", "runs", _words(status, "Reconciling"))
        case "Suspended":
            resume = _step("resume it: kubectl ivft{n} resume {run}", raw)
            return Explanation("waits", "is suspended", _words(status, "Suspended"), resume)
        case "Failed":
            return Explanation("bad", "has failed", _words(status, "Failed"), _next(raw, status, "Failed", now))
        case "Stalled":
            return Explanation("bad", "waits for you", _words(status, "Stalled"), _next(raw, status, "Stalled", now))
        case _:
            because = _words(status, "Reconciling") + (f"; Kueue: {queue}" if queue else "")
            return Explanation("busy", "is pending", because, _next(raw, status, "Reconciling", now))


def condition(status: InternVLFineTuneStatus, kind: str) -> Condition | None:
    """A condition by its type."""
    return next((each for each in status.conditions if each.type == kind), None)


def where_it_continues(status: InternVLFineTuneStatus) -> str:
    """Where a run starts when its workers start again."""
    if status.checkpoint:
        return f"from its newest checkpoint (step {status.checkpoint.step})"
    started = any(entry.started_at for entry in status.stages)
    return f"from the beginning of its stage {status.stage}" if started and status.stage else "from its beginning"


def is_queued(status: InternVLFineTuneStatus) -> bool:
    """Whether a queue holds the run's pods."""
    found = condition(status, "Reconciling")
    return found is not None and found.reason == "SchedulingGated"


def _unseen(raw: Raw, status: InternVLFineTuneStatus, now: datetime) -> Explanation | None:
    """The explanation while the operator has not processed the current spec; else None."""
    metadata = raw["metadata"]
    if status.observed_generation is not None and status.observed_generation >= metadata.get("generation", 1):
        return None
    if status.observed_generation is not None:
        return Explanation(
            "busy",
            "has been changed",
            "the operator has not processed the last change of the spec yet",
            "if this persists, check that the operator runs: " + _OPERATOR,
        )
    created = from_text(metadata.get("creationTimestamp"))
    age = (now - created).total_seconds() if created else 0.0
    if age < _PATIENCE:
        return Explanation("busy", "is new", f"it was created {duration(age)} ago")
    return Explanation(
        "bad",
        "has not been processed",
        f"it was created {duration(age)} ago, and no operator has processed it",
        f"check that the operator runs and watches this namespace: {_OPERATOR}",
    )


_OPERATOR = "kubectl get pods -A -l app.kubernetes.io/name=internvl-operator"


def _words(status: InternVLFineTuneStatus, kind: str) -> str:
    found = condition(status, kind)
    return f"{found.reason}: {found.message}" if found else "the status has no reason"


def _next(raw: Raw, status: InternVLFineTuneStatus, kind: str, now: datetime) -> str:
    found = condition(status, kind)
    reason, message = (found.reason, found.message) if found else ("", "")
    again = _again(status, now)
    cause = message.partition(":")[0]
    if reason in _LIMITS and cause in _NEXT:  # the reason of the last attempt, whose next step applies here too
        return _step(_NEXT[cause], raw, status) + "; any change of the spec starts the run again with a full budget"
    if reason in _NEXT:
        return _step(_NEXT[reason], raw, status, message) + again
    if field := re.match(r"(spec(?:\.[A-Za-z0-9_.-]+)?):", message):
        return _step(f"correct {field[1]}: kubectl{{n}} edit ivft {{run}}; the run then continues by itself", raw)
    if kind == "Stalled":
        return (
            f"correct what the message names; the run then continues by itself{again} (see {reason} in docs/runbook.md)"
        )
    if kind == "Failed":
        log = "read the log: kubectl ivft{n} logs {run} --stage {stage}; a change of the spec starts the run again "
        log += f"(see {reason} in docs/runbook.md)"
        return _step(log, raw, status)
    return again.removeprefix("; ")


def _after_warning(warning: str, raw: Raw) -> str:
    """The next step for a training warning of the form `Reason: message`."""
    reason = warning.partition(":")[0]
    return _step(_NEXT[reason], raw) if reason in _NEXT else f"see {reason} in docs/runbook.md"


def _again(status: InternVLFineTuneStatus, now: datetime) -> str:
    when = from_text(status.retry_at)
    seconds = (when - now).total_seconds() if when else 0.0
    return f"; next attempt in {duration(seconds)}" if seconds > 0 else ""


def _step(text: str, raw: Raw, status: InternVLFineTuneStatus | None = None, message: str = "") -> str:
    metadata = raw["metadata"]
    stage = (status.stage if status else None) or "preflight"
    worker = re.search(r"\bworker ([0-9]+) \(pod ", message)  # the others' pods may be deleted
    rank = f" --rank {worker[1]}" if worker and worker[1] != "0" else ""
    text = text.replace("{start}", where_it_continues(status) if status else "")
    return text.format(run=metadata["name"], n=f" -n {metadata['namespace']}", stage=stage, rank=rank)

"""Rules of a run's life that are only about time and counting. `now` is always given; durations are seconds."""

from datetime import datetime, timedelta

from internvl_api.spec import RunPolicy
from internvl_api.status import InternVLFineTuneStatus, StageName

from internvl_operator.core.observe import Pod
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.policies.failure_policy import Outcome
from internvl_operator.core.policies.startup_problems import Trouble
from internvl_operator.core.timestamps import from_text


def backoff(failures: int, config: OperatorConfig) -> float:
    """Wait before the start that follows the `failures`-th failure in a row: base, 2 x base, … up to the cap."""
    if failures < 1:
        return 0.0
    return float(min(config.retry_cap, config.retry_base * 2 ** min(failures - 1, 30)))


def restart_delay(outcome: Outcome, failures: int, config: OperatorConfig) -> float:
    """Wait before the next attempt, `failures` counting this one.

    A stalled stage always waits. A restart is at once the first time; one that keeps coming back without a newer
    checkpoint waits too, whoever is to blame, so that nothing here can become a hot loop.
    """
    return backoff(failures if outcome.kind == "stall" else failures - 1, config)


def within_budget(outcome: Outcome, status: InternVLFineTuneStatus, policy: RunPolicy) -> Outcome:
    """The outcome itself, or, when no restart of its budget is left, the end of the run."""
    last = f"{outcome.reason}: {outcome.message}; the "
    if outcome.budget == "user" and status.restarts.user >= policy.backoff_limit:
        text = f"{last}{policy.backoff_limit} restarts of spec.runPolicy.backoffLimit are used up"
        return Outcome("fail", "BackoffLimitExceeded", text)
    if outcome.budget == "infrastructure" and status.infrastructure_failures >= policy.infrastructure_limit:
        text = (
            f"{last}{policy.infrastructure_limit} restarts of spec.runPolicy.infrastructureLimit are used up without a "
            "newer checkpoint"
        )
        return Outcome("fail", "InfrastructureLimitExceeded", text)
    return outcome


def with_change(outcome: Outcome, stage: StageName, smaller: int | None, policy: RunPolicy) -> Outcome:
    """A batch too large for the GPUs: what the next attempt changes, or the end of the run where nothing may change.

    `smaller`: the next smaller micro batch, None when there is none. Trying again unchanged would end the same way,
    as the order of rows is fixed.
    """
    if outcome.kind != "change":
        return outcome
    if stage != "train":
        return Outcome("fail", outcome.reason, f"{outcome.message}; lower spec.evaluation.batchSize")
    if smaller is None:
        text = f"{outcome.message}; the micro batch cannot be made smaller: lower spec.training.maxSeqLength or "
        return Outcome("fail", outcome.reason, text + "spec.image.maxDynamicPatch, or raise spec.training.zeroStage")
    if policy.on_out_of_memory == "fail":
        text = f"{outcome.message}; lower spec.training.microBatchSize to {smaller} (the global batch stays), or set "
        return Outcome("fail", outcome.reason, text + "spec.runPolicy.onOutOfMemory: halveMicroBatch")
    text = f"{outcome.message}; the next attempt takes micro batches of {smaller}, and the same global batch"
    return Outcome("change", outcome.reason, text)


def seconds_until(moment: str | None, now: datetime) -> float:
    """Until a status timestamp; 0 when it is past or absent."""
    when = from_text(moment)
    return max(0.0, (when - now).total_seconds()) if when else 0.0


def deadline_left(policy: RunPolicy, status: InternVLFineTuneStatus, now: datetime) -> float | None:
    """Seconds until activeDeadlineSeconds after startedAt; None without a deadline. A resumed run starts anew."""
    return left(status.started_at, policy.active_deadline_seconds, now)


def deadline_exceeded(seconds: int | None, trouble: Trouble | None) -> Outcome:
    """The end of a run that took too long; `trouble`: what held it up at that moment."""
    text = f"spec.runPolicy.activeDeadlineSeconds: the run took longer than {seconds} s; raise it and the run goes on"
    return Outcome("fail", "DeadlineExceeded", text + (f" (at the end {trouble.message})" if trouble else ""))


def ttl_left(policy: RunPolicy, status: InternVLFineTuneStatus, now: datetime) -> float | None:
    """Seconds until the CR of a finished run is deleted; None when it stays."""
    return left(status.finished_at, policy.ttl_seconds_after_finished, now)


def force_left(pod: Pod, now: datetime, config: OperatorConfig) -> float:
    """Seconds until a pod that was asked to go is deleted by force: its node does not answer."""
    if pod.deleted_at is None:
        return config.force_delete_after
    return max(0.0, (pod.deleted_at - now).total_seconds() + config.force_delete_after)


def left(since: str | None, seconds: int | None, now: datetime) -> float | None:
    """Seconds until so many after a status timestamp, at least 0; None where either is absent."""
    start = from_text(since)
    if start is None or seconds is None:
        return None
    return max(0.0, (start + timedelta(seconds=seconds) - now).total_seconds())

"""Restart budgets, back-off, deadlines and time to live. `now` is passed in; durations are seconds."""

from datetime import datetime

from internvl_api.spec import RunPolicy
from internvl_api.status import InternVLFineTuneStatus

from internvl_operator.core.observe import Pod
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.policies.outcome import Outcome
from internvl_operator.core.policies.startup_problems import StartupProblem
from internvl_operator.core.timestamps import from_text

SHORT_GRACE = 5  # seconds to end, for a pod that has nothing to save


def backoff(failures: int, config: OperatorConfig) -> float:
    """Seconds to wait after `failures` failures in a row: base, 2 x base, … up to the cap."""
    if failures < 1:
        return 0.0
    return float(min(config.retry_cap, config.retry_base * 2 ** min(failures - 1, 30)))


def restart_delay(outcome: Outcome, failures: int, config: OperatorConfig) -> float:
    """Seconds to wait before the next attempt; `failures` includes the current one.

    A stalled stage always waits. The first restart is immediate; further restarts without a newer checkpoint wait too,
    whatever their cause, so that no run restarts in a hot loop. An attempt that has waited already (`at_once`) starts
    without a pause.
    """
    if outcome.at_once:
        return 0.0
    return backoff(failures if outcome.kind == "stall" else failures - 1, config)


def within_budget(outcome: Outcome, status: InternVLFineTuneStatus, policy: RunPolicy) -> Outcome:
    """The outcome itself; a failure when no restart of its budget is left."""
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


def seconds_until(moment: str | None, now: datetime) -> float:
    """Seconds until a status timestamp; 0 when it is past or absent."""
    when = from_text(moment)
    return max(0.0, (when - now).total_seconds()) if when else 0.0


def seconds_to_retry(status: InternVLFineTuneStatus, now: datetime, config: OperatorConfig) -> float:
    """Seconds until the next attempt; 0 for a time beyond the longest pause, which a wrong clock has written."""
    wait = seconds_until(status.retry_at, now)
    return wait if wait <= config.retry_cap else 0.0


def deadline_left(policy: RunPolicy, status: InternVLFineTuneStatus, now: datetime) -> float | None:
    """Seconds until activeDeadlineSeconds after startedAt, which a resumed run resets; None without a deadline."""
    return left(status.started_at, policy.active_deadline_seconds, now)


def deadline_exceeded(seconds: int | None, problem: StartupProblem | None) -> Outcome:
    """The failure of a run that took too long; `problem`: what blocked it at the deadline."""
    text = f"spec.runPolicy.activeDeadlineSeconds: the run took longer than {seconds} s; raise it to continue the run"
    return Outcome("fail", "DeadlineExceeded", text + (f" (at the end {problem.message})" if problem else ""))


def ttl_left(policy: RunPolicy, status: InternVLFineTuneStatus, now: datetime) -> float | None:
    """Seconds until the CR of a finished run is deleted; None when it is kept."""
    return left(status.finished_at, policy.ttl_seconds_after_finished, now)


def shortened(grace: int | None) -> int:
    """Seconds to end for a pod that has nothing to save: at most `grace`, the spec's (None: the spec has none)."""
    return SHORT_GRACE if grace is None else min(SHORT_GRACE, grace)


def force_left(pod: Pod, now: datetime, config: OperatorConfig) -> float:
    """Seconds until a terminating pod is deleted by force, because its node does not answer."""
    if pod.deletion_timestamp is None:
        return config.force_delete_after
    return max(0.0, (pod.deletion_timestamp - now).total_seconds() + config.force_delete_after)


def left(since: str | None, seconds: int | None, now: datetime) -> float | None:
    """Seconds left of a duration that began at a status timestamp, at least 0; None when either is absent."""
    start = from_text(since)
    if start is None or seconds is None:
        return None
    return max(0.0, seconds - (now - start).total_seconds())  # start + seconds may be beyond the calendar

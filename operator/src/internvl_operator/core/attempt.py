"""One group's life: start it, watch it, end its attempt.

Pods have stable names, so an attempt starts only when no pod of an earlier one is left; and an attempt ends by
raising status.attempt FIRST (in the same write as the counts), which turns its pods into leftovers to be deleted. An
operator that dies between any two writes therefore neither counts an end twice nor forgets it.
"""

from datetime import timedelta
from typing import Any

from internvl_api.status import StageStatus, Workers

from internvl_operator.core import stages
from internvl_operator.core.context import Draft
from internvl_operator.core.policies import (
    container_restart,
    failure_policy,
    oom_policy,
    progress_deadline,
    run_policy,
    start_deadlines,
)
from internvl_operator.core.policies.failure_policy import Outcome
from internvl_operator.core.policies.slow_start import first_look, slow_start
from internvl_operator.core.policies.startup_problems import trouble
from internvl_operator.core.resources import config_map, gang, names, pods, service
from internvl_operator.core.stages import Stage
from internvl_operator.core.timestamps import to_text


def outcome(draft: Draft, stage: Stage) -> Outcome | None:
    """The group's outcome, once it is certain."""
    members = draft.members
    created = draft.created(stage)
    if not members and not created:
        return None
    size = stage.size(draft.run.spec)
    found = failure_policy.classify(members, size if created else len({pod.rank for pod in members}))
    if found is None or found.echo:
        found = container_restart.started_anew(draft) or found
    if found and found.kind == "succeeded" and len(members) < size:
        return None  # the rest is still to be made
    if found and (
        found.echo or found.reason == failure_policy.RESUME or (found.kind, found.budget) == ("retry", "user")
    ):
        wait = failure_policy.undecided(members, draft.now, draft.config.settle)
        if wait > 0:
            draft.wait(wait)
            return None
    return found or progress_deadline.overdue(draft, stage) or start_deadlines.overdue(draft, stage)


def start(draft: Draft, stage: Stage) -> None:
    """Make the group, or what is missing of it, as soon as its time has come and every old pod is gone."""
    entry, status = draft.entry(stage), draft.status
    if wait := run_policy.seconds_until(status.retry_at, draft.now):
        draft.remove([pod for pod in draft.leftovers if pod.active])
        draft.wait(wait)
        return  # what was said when the last attempt ended still holds
    if draft.leftovers or draft.strangers:
        draft.remove(draft.leftovers)
        _say_waiting(draft, stage)
        return
    have = {pod.rank for pod in draft.members}
    ranks = [rank for rank in range(stage.size(draft.run.spec)) if rank not in have]
    draft.apply += _shared(draft, stage)
    draft.apply += [pods.build(draft.run, stage, status.attempt, rank, draft.config) for rank in ranks]
    entry.attempt, entry.state, entry.finished_at = status.attempt, "Pending", None
    entry.started_at = draft.timestamp()
    status.retry_at = None
    status.started_at = status.started_at or draft.timestamp()
    status.finished_at = None
    watch(draft, stage)


def watch(draft: Draft, stage: Stage) -> None:
    """Say how a group that was made is doing, and mend its Service."""
    entry, size = draft.entry(stage), stage.size(draft.run.spec)
    container_restart.note(draft, size)
    draft.status.workers = count(draft)
    if not draft.apply:
        draft.apply += _shared(draft, stage, only_missing=True)
    running = sum(pod.running for pod in draft.members)
    done = draft.status.workers.succeeded
    problem = trouble(draft.members, draft.run.spec.secrets, draft.run.namespace)
    if problem is None:
        problem = slow_start(draft.members, draft.run.spec, draft.now)
        if left := first_look(draft.members, draft.now):
            draft.wait(left)
    if problem:
        draft.say("Stalled" if problem.stalled else "Pending", problem.reason, problem.message)
    elif running and running + done == size:
        entry.state = "Running"
        draft.say("Running", f"{stage.title}Running", f"{stage.name}: {running} of {size} workers run{_attempt(draft)}")
    elif entry.state == "Running":
        draft.say("Running", f"{stage.title}Ending", f"{stage.name}: {running} of {size} workers run{_attempt(draft)}")
    else:
        text = f"{stage.name}: {running} of {size} workers run{_attempt(draft)}{_before(entry)}"
        draft.say("Pending", f"{stage.title}Starting", text)


def end_attempt(draft: Draft, stage: Stage, ended: Outcome) -> None:
    """Count the end of the attempt and say what follows; its pods become leftovers."""
    entry, status = draft.entry(stage), draft.status
    status.failures += 1
    if ended.kind == "retry" and ended.budget == "user":
        status.restarts.user += 1
    elif ended.budget == "infrastructure":
        status.restarts.infrastructure += 1
        status.infrastructure_failures += 1
    elif ended.kind == "change" and draft.run.resolved.run_config:
        status.micro_batch_size = oom_policy.smaller(draft.run.resolved.run_config, status)
    delay = run_policy.restart_delay(ended, status.failures, draft.config)
    status.retry_at = to_text(draft.now + timedelta(seconds=delay)) if delay else None
    entry.state, entry.finished_at = "Pending", draft.timestamp()
    entry.reason, entry.message = ended.reason, ended.message
    next_attempt(draft)
    when = f"starts again at {status.retry_at}" if delay else "starts again"
    if ended.kind == "stall":
        draft.say("Stalled", ended.reason, f"{ended.message} ({stage.name} {when}, or as soon as spec changes)")
    else:
        draft.say("Pending", ended.reason, f"{ended.message}; {stage.name} {when}{_attempt(draft)}")


def next_attempt(draft: Draft) -> None:
    """Close the current attempt; whatever pods it has become leftovers, and those that work are asked to go."""
    draft.status.attempt += 1
    draft.status.workers, draft.status.progress_at, draft.status.unscheduled_since = Workers(), None, None
    draft.status.containers = []
    draft.remove([pod for pod in draft.leftovers if pod.active])
    draft.wait(run_policy.seconds_until(draft.status.retry_at, draft.now))


def count(draft: Draft) -> Workers:
    """Members by what became of them; pods about to be made count as active."""
    members = draft.members
    succeeded = sum(pod.succeeded for pod in members)
    failed = sum(pod.finished and not pod.succeeded for pod in members)
    made = sum(child["kind"] == "Pod" for child in draft.apply)
    return Workers(active=len(members) - succeeded - failed + made, succeeded=succeeded, failed=failed)


def _shared(draft: Draft, stage: Stage, *, only_missing: bool = False) -> list[dict[str, Any]]:
    """Service and PodGroup always; run.yaml is written once an attempt, so that all its pods read the same."""
    always = [service.build(draft.run), *gang.pod_groups(draft.run, stage)]
    if only_missing and names.config_map(draft.run.name) in draft.observed.config_maps:
        return always
    return [config_map.build(draft.run, oom_policy.run_yaml(draft.run, draft.status)), *always]


def _say_waiting(draft: Draft, stage: Stage) -> None:
    leaving = len(draft.leftovers)
    if draft.strangers:
        text = f"waiting for {', '.join(draft.strangers[:3])} of an earlier {draft.run.name!r} to go"
    else:
        text = f"waiting for {leaving} pods of the last attempt to end"
    draft.say("Pending", "WaitingForOldPods", f"{stage.name}: {text}{_attempt(draft)}{_before(draft.entry(stage))}")


def _attempt(draft: Draft) -> str:
    return f", attempt {draft.status.attempt}" if draft.status.attempt > 1 else ""


def _before(entry: StageStatus) -> str:
    return f"; the last attempt: {stages.ending(entry)}" if entry.message else ""

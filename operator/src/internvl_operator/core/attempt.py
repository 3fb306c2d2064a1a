"""One attempt of a stage: decide whether its group has ended; start, watch and end it.

Pods have stable names, so an attempt starts only when no pod of an earlier one is left. An attempt ends with one write
that raises status.attempt and the counts; its pods are old pods from then on and are deleted. An operator that dies
between any two writes therefore counts each end exactly once.
"""

from datetime import timedelta
from typing import Any

from internvl_api.status import StageStatus, Workers

from internvl_operator.core import progress, stages
from internvl_operator.core.context import ReconcileContext
from internvl_operator.core.policies import (
    bad_nodes,
    container_restart,
    elastic,
    failure_policy,
    lost_nodes,
    oom_policy,
    progress_deadline,
    run_policy,
    start_deadlines,
)
from internvl_operator.core.policies.outcome import Decision, Outcome
from internvl_operator.core.policies.startup_problems import seconds_to_notice, slow_start, startup_problem
from internvl_operator.core.resources import config_map, gang, names, network_policy, orphans, pods, service
from internvl_operator.core.stages import Stage
from internvl_operator.core.timestamps import to_text


def decide(context: ReconcileContext, stage: Stage) -> Decision:
    """Whether the group has ended, and how; else when to look again. Writes nothing."""
    workers, created = context.workers, context.created(stage)
    if not workers and not created:
        return Decision()
    size = stage.size(context.run.spec)
    if not stage.parallel and any(pod.rank == 0 and pod.succeeded for pod in workers):
        return Decision(Outcome("succeeded", "Succeeded", "worker 0 succeeded"))
    expected = size if created else len({pod.rank for pod in workers})
    found = failure_policy.classify(workers, expected, pods.image_setting(context.run.spec))
    if found is None or found.secondary:
        lost = lost_nodes.outcome(workers, context.lost)
        found = container_restart.restarted_in_place(context) or lost or found
    if found and found.kind == "succeeded" and len(workers) < size:
        return Decision()  # the remaining workers are not created yet
    if found and found.may_have_another_cause:
        wait = failure_policy.seconds_to_settle(workers, context.now, context.config.settle)
        if wait > 0:
            return Decision(wait=wait)
    if found:
        return Decision(oom_policy.with_peak(found, workers, context.status))
    hang = progress_deadline.decide(context, stage)
    return hang if hang.outcome else hang | start_deadlines.decide(context, stage) | elastic.growth(context, stage)


def start(context: ReconcileContext, stage: Stage) -> None:
    """Create the group's missing workers once the retry time has come and every old pod is gone."""
    entry, status = context.entry(stage), context.status
    if wait := run_policy.seconds_to_retry(status, context.now, context.config):
        context.remove([pod for pod in context.old_pods if pod.active])
        context.wait(wait)
        return  # the conditions set at the end of the last attempt still apply
    if context.old_pods or context.children_of_earlier_run:
        context.remove(context.old_pods)
        context.remove(context.leaving_pods_of_earlier_run)
        _wait_for_old_pods(context, stage)
        return
    have = {pod.rank for pod in context.workers}
    ranks = [rank for rank in range(stage.size(context.run.spec)) if rank not in have]
    context.apply += _shared(context, stage)
    avoid, adopted = bad_nodes.avoided(status), orphans.earlier_owners(context.observed.config_maps.values())
    used = context.usage(context.run.status, context.now) if stage.name == "publish" else None
    context.apply += [
        pods.build(context.run, stage, status.attempt, rank, context.config, avoid, adopted, used) for rank in ranks
    ]
    entry.attempt, entry.state, entry.finished_at = status.attempt, "Pending", None
    entry.started_at = context.timestamp()
    status.retry_at = None
    status.started_at = status.started_at or context.timestamp()
    status.finished_at = None
    watch(context, stage)


def watch(context: ReconcileContext, stage: Stage) -> None:
    """Report the state of a created group in status, and restore its Service and NetworkPolicy."""
    entry, size = context.entry(stage), stage.size(context.run.spec)
    context.status.containers = context.status.containers or container_restart.containers(context.workers, size)
    context.status.workers = count(context)
    if not context.apply:
        context.apply += _shared(context, stage, only_missing=True)
    running = sum(pod.running for pod in context.workers)
    done = context.status.workers.succeeded
    problem = startup_problem(context.workers, context.run.spec, context.run.namespace)
    if problem is None:
        problem = slow_start(context.workers, context.run.spec, context.now)
        if left := seconds_to_notice(context.workers, context.now):
            context.wait(left)
    if problem:
        context.set_phase("Stalled" if problem.stalled else "Pending", problem.reason, problem.message)
    elif running and running + done == size:
        entry.state = "Running"
        context.set_phase(
            "Running", f"{stage.title}Running", f"{stage.name}: {running} of {size} workers run{_attempt_note(context)}"
        )
    elif entry.state == "Running":
        context.set_phase(
            "Running", f"{stage.title}Ending", f"{stage.name}: {running} of {size} workers run{_attempt_note(context)}"
        )
    else:
        text = f"{stage.name}: {running} of {size} workers run{_attempt_note(context)}{_last_attempt_note(entry)}"
        context.set_phase("Pending", f"{stage.title}Starting", text)


def end(context: ReconcileContext, stage: Stage, ended: Outcome) -> None:
    """Count the end of the attempt and report what follows; its pods become old pods."""
    entry, status = context.entry(stage), context.status
    status.failures += 1
    if ended.kind == "retry" and ended.budget == "user":
        status.restarts.user += 1
    elif ended.budget == "infrastructure":
        status.restarts.infrastructure += 1
        status.infrastructure_failures += 1
    elif ended.kind == "change" and context.run.resolved.run_config:
        status.micro_batch_size = oom_policy.smaller_micro_batch(context.run.resolved.run_config, status)
    delay = run_policy.restart_delay(ended, status.failures, context.config)
    status.retry_at = to_text(context.now + timedelta(seconds=delay)) if delay else None
    entry.state, entry.finished_at = "Pending", context.timestamp()
    entry.reason, entry.message = ended.reason, ended.message
    begin_next(context)
    when = f"starts again at {status.retry_at}" if delay else "starts again"
    if ended.kind == "stall":
        context.set_phase("Stalled", ended.reason, f"{ended.message} ({stage.name} {when}, or as soon as spec changes)")
    else:
        context.set_phase("Pending", ended.reason, f"{ended.message}; {stage.name} {when}{_attempt_note(context)}")


def begin_next(context: ReconcileContext) -> None:
    """Start the next attempt; the current pods become old pods, and active ones are deleted.

    If a worker never started, training never began, so the other workers have nothing to save.
    """
    never_met = any(pod.unstarted for pod in context.workers)
    context.status.attempt += 1
    context.status.workers, context.status.progress_at, context.status.unscheduled_since = Workers(), None, None
    context.status.containers, context.status.lost_nodes = [], []
    progress.between_workers(context)
    context.remove([pod for pod in context.old_pods if pod.active], soon=never_met)
    context.wait(run_policy.seconds_to_retry(context.status, context.now, context.config))


def count(context: ReconcileContext) -> Workers:
    """Workers by state; pods about to be created count as active."""
    workers = context.workers
    succeeded = sum(pod.succeeded for pod in workers)
    failed = sum(pod.finished and not pod.succeeded for pod in workers)
    made = sum(child["kind"] == "Pod" for child in context.apply)
    return Workers(active=len(workers) - succeeded - failed + made, succeeded=succeeded, failed=failed)


def _shared(context: ReconcileContext, stage: Stage, *, only_missing: bool = False) -> list[dict[str, Any]]:
    """Everything but the pods; run.yaml changes only between attempts, so that all pods read the same one."""
    run = context.run
    always = [*network_policy.build(run, context.config), service.build(run), *gang.pod_groups(run, stage)]
    if only_missing and names.config_map(context.run.name) in context.observed.config_maps:
        return always
    return [config_map.build(run, oom_policy.run_yaml(run, context.status), context.config), *always]


def _wait_for_old_pods(context: ReconcileContext, stage: Stage) -> None:
    leaving = len(context.old_pods)
    if context.children_of_earlier_run:
        children = ", ".join(context.children_of_earlier_run[:3])
        text = f"waiting for the deletion of {children} of an earlier {context.run.name!r}"
    else:
        text = f"waiting for {leaving} pods of the last attempt to terminate{_kept_by_finalizers(context)}"
    context.set_phase(
        "Pending",
        "WaitingForOldPods",
        f"{stage.name}: {text}{_attempt_note(context)}{_last_attempt_note(context.entry(stage))}",
    )


def _kept_by_finalizers(context: ReconcileContext) -> str:
    """The finalizers that keep a pod whose grace period ended long ago: not even a forced deletion removes it."""
    for pod in context.old_pods:
        if pod.finalizers and pod.deletion_timestamp and run_policy.force_left(pod, context.now, context.config) <= 0:
            listed = ", ".join(pod.finalizers)
            return f"; the finalizers {listed} keep pod {pod.name}: whoever set them has to remove them"
    return ""


def _attempt_note(context: ReconcileContext) -> str:
    wanted, stage = context.run.wanted_workers, context.stage
    size = f" (spec.workers: {wanted})" if wanted and stage and stage.parallel else ""
    return size + (f", attempt {context.status.attempt}" if context.status.attempt > 1 else "")


def _last_attempt_note(entry: StageStatus) -> str:
    return f"; the last attempt: {stages.ending(entry)}" if entry.message else ""

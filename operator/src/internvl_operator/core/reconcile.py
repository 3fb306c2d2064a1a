"""One pass: (run, observed children, now) -> Plan. Pure; every trigger ends here.

Rules that are decided here:
- Pods of completed stages stay until the run is deleted, as those of a Kubernetes Job do: they hold no GPU, and their
  logs stay readable. cleanPodPolicy: All deletes them when the run ends.
- A changed podTemplate, secrets or scheduling restarts the current stage; any other change except runPolicy restarts
  the pipeline, where the trainer skips stages that the change does not affect. Neither counts as a restart.
- An unstarted pod that was made with other settings of the operator, such as its default image, is recreated. This
  does not count as a restart.
- A Complete run ignores changes of its spec, and its Ready condition says so. A Failed run starts again with a full
  budget as soon as its spec changes.
- activeDeadlineSeconds counts from startedAt, which a resumed run resets, as a Kubernetes Job does.
"""

from datetime import datetime

from internvl_api.constants import ALREADY_PUBLISHED
from internvl_api.status import Progress, Restarts, StageStatus, Workers

from internvl_operator.core import attempt, progress, stages
from internvl_operator.core.conditions import is_true, with_note_of_change
from internvl_operator.core.context import ReconcileContext
from internvl_operator.core.observe import Observed, Pod
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.plan import Plan, Ref
from internvl_operator.core.policies import bad_nodes, container_restart, elastic, oom_policy, run_policy
from internvl_operator.core.policies.outcome import Decision, Outcome
from internvl_operator.core.policies.startup_problems import startup_problem
from internvl_operator.core.resources import gang, pods
from internvl_operator.core.run import Run
from internvl_operator.core.stages import Stage

_TIME_TO_START = 15  # seconds before pods with other settings of the operator are replaced


def reconcile(run: Run, observed: Observed, now: datetime, config: OperatorConfig) -> Plan:
    """The plan of this pass. Never raises for anything that a user or a cluster may contain."""
    if run.deleting:
        return Plan()  # Kubernetes deletes the children through their owner references
    context = ReconcileContext.begin(run, observed, now, config)
    if _stays_finished(run):
        _keep_finished(context)
    elif error := run.mistake:
        _keep_invalid(context, error.reason, f"{error.field}: {error.message}")
    elif words := gang.not_enabled(run.spec.scheduling, config):
        context.set_phase("Stalled", "GangNotEnabled", words)
    else:
        _follow_spec(context)
        _advance(context)
        context.release(context.pods_of_done_stages)
    return context.plan()


def rejected(run: Run, reason: str, message: str, now: datetime, config: OperatorConfig) -> Plan:
    """The plan after the API server refused a write: the recorded status, Stalled with the server's message."""
    context = ReconcileContext.begin(run, Observed(), now, config)
    context.set_phase("Stalled", reason, message)
    return context.plan()


def child_refused(
    run: Run, refused: Plan, observed: Observed, problem: tuple[str, str], now: datetime, config: OperatorConfig
) -> Plan:
    """The plan after the API server refused a child of the plan `refused`; `problem`: reason and message.

    Status keeps what that pass recorded. A group that was created in part ends: its pods are deleted, so that they hold
    no GPUs, and it is tried again after a growing pause. `observed` includes the pods that were created.
    """
    if refused.status is None:
        return rejected(run, *problem, now, config)
    context = ReconcileContext.begin(run, observed, now, config)
    context.status = refused.status.model_copy(deep=True)
    stage = context.stage
    if stage and context.workers and any(child["kind"] == "Pod" for child in refused.apply):
        refused_worker = _apply(context, elastic.after_refusal(context, stage, *problem))
        attempt.end(context, stage, refused_worker or Outcome("stall", *problem))
    else:
        if stage:
            _not_created(context, stage)
        context.set_phase("Stalled", *problem)
    return context.plan()


def _not_created(context: ReconcileContext, stage: Stage) -> None:
    """Record that the group has no pod yet, so that the next pass creates it; a group that runs stays as it is."""
    if not context.workers:
        recorded = {entry.name: entry for entry in context.run.status.stages}
        context.status.stages = [
            entry if entry.name != stage.name else recorded.get(entry.name, StageStatus(name=stage.name))
            for entry in context.status.stages
        ]
        context.status.workers = Workers()


def _stays_finished(run: Run) -> bool:
    status = run.status
    if is_true(status.conditions, "Complete"):
        return True
    return is_true(status.conditions, "Failed") and status.observed_generation == run.generation


def _keep_finished(context: ReconcileContext) -> None:
    """Note a changed spec; delete the pods that cleanPodPolicy names, and the CR when its TTL has passed.

    Reads only runPolicy, because the rest of the spec may have become invalid.
    """
    run, status = context.run, context.status
    changed = status.run_digest not in (None, run.run_digest)
    status.conditions = with_note_of_change(status.conditions, changed=changed)
    clean = run.run_policy.clean_pod_policy
    if clean != "None":
        context.remove([pod for pod in context.own_pods if clean == "All" or not pod.finished])
        context.release(context.own_pods)
    left = run_policy.ttl_left(run.run_policy, context.status, context.now)
    if left is None:
        return
    if left > 0:
        context.wait(left)
    else:
        context.delete[run.uid] = Ref("InternVLFineTune", run.name, run.uid)


def _keep_invalid(context: ReconcileContext, reason: str, message: str) -> None:
    """Obey suspension and deadline, and record what the current group does; start nothing new.

    The size of the group is the one recorded when it was created.
    """
    policy, stage = context.run.run_policy, context.stage
    left = run_policy.deadline_left(policy, context.status, context.now)
    if stage is None:
        context.set_phase("Stalled", reason, message)
    elif policy.suspend:
        _suspend(context, stage, f"; the spec is invalid: {message}")
    elif left is not None and left <= 0:
        _fail(context, stage, run_policy.deadline_exceeded(policy.active_deadline_seconds, None))
    else:
        progress.collect(context)
        _record_invalid(context, stage, reason, message)
        if left is not None:
            context.wait(left)


def _record_invalid(context: ReconcileContext, stage: Stage, reason: str, message: str) -> None:
    recorded = context.status.workers or Workers()
    size = recorded.active + recorded.succeeded + recorded.failed
    running = sum(pod.running for pod in context.workers)
    if context.created(stage) and 0 < size == sum(pod.succeeded for pod in context.workers):
        _succeed(context, stage)
        message = f"{message} ({stage.name} has succeeded; the next stage starts when this is corrected)"
    elif running:
        context.status.workers = attempt.count(context)
        message = f"{message} ({stage.name}: {running} workers that have started run on)"
    context.set_phase("Stalled", reason, message)


def _follow_spec(context: ReconcileContext) -> None:
    """Apply the consequences of a changed spec, before any other decision."""
    run, status = context.run, context.status
    if status.observed_generation not in (None, run.generation):
        status.retry_at, status.failures, status.infrastructure_failures = None, 0, 0
    stage = context.stage
    if stage and context.entry(stage).state == "Failed":  # its spec has changed since
        status.restarts, status.started_at, status.finished_at = Restarts(), None, None
        context.entry(stage).state = "Pending"
        _close_attempt(context)
    if status.run_digest not in (None, run.run_digest):
        _close_attempt(context)
        status.stages, status.artifacts = stages.fresh(run.spec), {}
        status.evaluation = status.micro_batch_size = status.elastic = None
        status.progress = status.progress_text = status.checkpoint = None
    if any(_is_out_of_date(context, pod) for pod in context.workers):
        _close_attempt(context)
    elif _have_other_defaults(context):
        _replace_unstarted(context)
    status.run_digest, status.defaults = run.run_digest, run.defaults


def _is_out_of_date(context: ReconcileContext, pod: Pod) -> bool:
    """Whether a worker has an earlier spec."""
    return (pod.run_digest, pod.pod_digest) != (context.run.run_digest, context.run.pod_digest)


def _have_other_defaults(context: ReconcileContext) -> bool:
    """Whether a worker has not started and has other settings of the operator than today's.

    Keeps pods of an operator that recorded no digest of its settings, so that an upgrade restarts nothing.
    """
    stage, recorded = context.stage, {pod.defaults_digest for pod in context.workers if pod.unstarted} - {""}
    if stage is None or not recorded:
        return False
    return recorded != {pods.defaults_digest(context.run, stage, context.config)}


def _replace_unstarted(context: ReconcileContext) -> None:
    """Start a new attempt with today's settings, when the pods have had time to start.

    Two operators with different settings would otherwise replace each other's pods in a loop.
    """
    stage = context.stage
    since = context.entry(stage).started_at if stage else None
    left = run_policy.left(since, _TIME_TO_START, context.now)
    if left:
        context.wait(left)
    else:
        _close_attempt(context)


def _close_attempt(context: ReconcileContext) -> None:
    """Start a new attempt, so that the current pods become old pods; an attempt without pods is kept."""
    stage = context.stage
    if stage and (context.workers or context.created(stage)):
        context.entry(stage).state = "Pending"
        attempt.begin_next(context)


def _advance(context: ReconcileContext) -> None:
    """Record succeeded stages; act on the first stage that has not succeeded."""
    while stage := context.stage:
        progress.collect(context)
        ended = _apply(context, attempt.decide(context, stage))
        if ended is None or ended.kind != "succeeded":
            _act(context, stage, ended)
            return
        published = _found_published(context, stage)
        _succeed(context, stage)
        if published:
            return _complete_at_once(context)
    _complete(context)


def _apply(context: ReconcileContext, decision: Decision) -> Outcome | None:
    """Write a decision into the context; the outcome, when the attempt has ended."""
    for field, value in decision.record.items():
        setattr(context.status, field, value)
    if decision.wait is not None:
        context.wait(decision.wait)
    context.probe = decision.probe
    return decision.outcome


def _act(context: ReconcileContext, stage: Stage, ended: Outcome | None) -> None:
    policy = context.run.spec.run_policy
    left = run_policy.deadline_left(policy, context.status, context.now)
    if policy.suspend:
        _suspend(context, stage)
    elif left is not None and left <= 0:
        found = startup_problem(context.workers, context.run.spec, context.run.namespace)
        _fail(context, stage, run_policy.deadline_exceeded(policy.active_deadline_seconds, found))
        context.delete_anyway = True
    elif ended is None:
        _go_on(context, stage)
    else:
        restarted = container_restart.restarted_pod(context)
        context.status.node_failures = bad_nodes.counted(context.status, context.workers, restarted)
        ended = oom_policy.decide(ended, stage.name, _smaller_micro_batch(context), policy)
        ended = run_policy.within_budget(ended, context.status, policy)
        (_fail if ended.kind == "fail" else attempt.end)(context, stage, ended)
    if left and context.status.phase not in ("Failed", "Suspended"):
        context.wait(left)


def _smaller_micro_batch(context: ReconcileContext) -> int | None:
    run_config = context.run.resolved.run_config
    return oom_policy.smaller_micro_batch(run_config, context.status) if run_config else None


def _go_on(context: ReconcileContext, stage: Stage) -> None:
    if context.created(stage) and context.workers:
        attempt.watch(context, stage)
    else:
        attempt.start(context, stage)


def _suspend(context: ReconcileContext, stage: Stage, note: str = "") -> None:
    """Delete every pod with its grace period, in which a worker saves a checkpoint; `note` ends the message."""
    _close_attempt(context)
    context.remove(context.old_pods)
    context.delete_anyway = True
    context.status.workers, context.status.retry_at, context.status.failures = Workers(), None, 0
    context.status.started_at = None  # resets activeDeadlineSeconds
    context.status.elastic = None  # a resumed run tries all workers
    leaving = len(context.old_pods)
    text = f"{leaving} pods save their state and terminate" if leaving else "no pod is left"
    context.set_phase("Suspended", "Suspended", f"spec.runPolicy.suspend is true; {text}{note}")


def _succeed(context: ReconcileContext, stage: Stage) -> None:
    context.remove([pod for pod in context.workers if not pod.finished])  # pods of preflight that the first outran
    entry = context.entry(stage)
    entry.state, entry.finished_at, entry.reason, entry.message = "Succeeded", context.timestamp(), None, None
    if stage.name == "train" and context.status.progress:
        trained = context.status.progress
        entry.message = "; ".join(filter(None, (trained.warning, trained.ended_early))) or None
    entry.attempt = context.status.attempt
    context.status.failures, context.status.infrastructure_failures, context.status.retry_at = 0, 0, None
    progress.between_workers(context)
    context.status.progress_at = context.status.unscheduled_since = context.status.progress_text = None
    context.status.workers, context.status.containers = attempt.count(context), []


def _found_published(context: ReconcileContext, stage: Stage) -> bool:
    """Whether preflight found the results of every stage, as after the deletion of a published run's resource."""
    return stage.name == "preflight" and any(
        pod.result is not None and pod.result.reason == ALREADY_PUBLISHED for pod in context.workers
    )


def _complete_at_once(context: ReconcileContext) -> None:
    """Complete a run that was published before, without its remaining stages."""
    for entry in context.status.stages:
        if entry.state != "Succeeded":
            entry.state, entry.finished_at = "Skipped", context.timestamp()
    output = context.run.spec.output
    _complete(context, ALREADY_PUBLISHED, f"found published at {output}; nothing was done again")


def _complete(context: ReconcileContext, reason: str = "Published", message: str = "") -> None:
    context.status.finished_at = context.timestamp()
    context.status.retry_at = context.status.elastic = None
    context.status.workers = Workers(succeeded=1)
    context.status.progress_text = progress.figures(context.status.progress or Progress())
    context.set_phase("Succeeded", reason, message or f"published at {context.run.spec.output}")
    _keep_finished(context)


def _fail(context: ReconcileContext, stage: Stage, ended: Outcome) -> None:
    entry = context.entry(stage)
    entry.state, entry.finished_at = "Failed", context.timestamp()
    entry.reason, entry.message = ended.reason, ended.message
    context.status.finished_at, context.status.retry_at = context.timestamp(), None
    context.status.workers, context.status.elastic = attempt.count(context), None  # started again, it tries all
    context.set_phase("Failed", ended.reason, ended.message)
    _keep_finished(context)

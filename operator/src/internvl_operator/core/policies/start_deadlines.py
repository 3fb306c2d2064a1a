"""End attempts whose workers are not scheduled or started in time, as scheduled workers hold GPUs meanwhile.

Ending the attempt frees the GPUs; the next attempt starts after a growing pause, so that two groups with half of the
nodes each do not block each other for ever. Pods held back by a queue hold no GPU and may wait.
"""

from internvl_operator.core.context import ReconcileContext
from internvl_operator.core.observe import Pod
from internvl_operator.core.policies import bad_nodes, elastic, run_policy
from internvl_operator.core.policies.outcome import Decision, Outcome
from internvl_operator.core.policies.startup_problems import missing_prerequisite, startup_problem
from internvl_operator.core.stages import Stage


def decide(context: ReconcileContext, stage: Stage) -> Decision:
    """End an attempt whose pods miss a start deadline; before that, wait for the deadline."""
    if not context.created(stage):
        return Decision()
    scheduling = _scheduling_deadline(context, stage)
    return scheduling if scheduling.outcome else scheduling | _start_deadline(context, stage)


def _scheduling_deadline(context: ReconcileContext, stage: Stage) -> Decision:
    limit, avoided = elastic.scheduling_deadline(context.run.spec), bad_nodes.avoided(context.status)
    if limit is not None and any(pod.scheduling_gated for pod in context.workers):
        size = stage.size(context.run.spec)
        text = f"the queue did not admit {size} workers within {limit} s (spec.runPolicy.schedulingDeadlineSeconds)"
        if smaller := elastic.reduced(context, stage, size - 1, text):
            return _queue_deadline(context, stage, limit, smaller)
    if avoided:
        limit = min(limit or bad_nodes.PATIENCE, bad_nodes.PATIENCE)
    unscheduled = [pod for pod in context.workers if stage.waits_for(pod.rank) and _needs_node(pod)]
    if limit is None or not unscheduled:
        return Decision(record={"unscheduled_since": None})
    since = context.status.unscheduled_since or context.timestamp()
    record = {"unscheduled_since": since}
    if left := run_policy.left(since, limit, context.now):
        return Decision(wait=left, record=record)
    if avoided:
        return _allow_nodes_again(context, avoided, limit)
    pod = next((pod for pod in unscheduled if pod.unschedulable), unscheduled[0])
    found = startup_problem([pod], context.run.spec, context.run.namespace)
    reason = found.message if found and found.stalled else pod.unschedulable or "no reason from the scheduler"
    scheduled = len(context.workers) - len(unscheduled)
    text = f"pod {pod.name} found no node within {limit} s (spec.runPolicy.schedulingDeadlineSeconds): {reason}"
    if smaller := elastic.reduced(context, stage, scheduled, text):
        return smaller
    text += f"; releasing the {scheduled} of {stage.size(context.run.spec)} workers that were scheduled"
    return Decision(Outcome("stall", "SchedulingDeadlineExceeded", text), record=record)


def _queue_deadline(context: ReconcileContext, stage: Stage, limit: int, smaller: Decision) -> Decision:
    """Queue with the next smaller number of workers when the queue takes too long; the smallest waits without limit.

    The time in the queue counts from the creation of the pods; the scheduler's begins when the queue has admitted them.
    """
    if left := run_policy.left(context.entry(stage).started_at, limit, context.now):
        return Decision(wait=left, record={"unscheduled_since": None})
    return smaller


def _allow_nodes_again(context: ReconcileContext, avoided: list[str], limit: int) -> Decision:
    """Start again at once with every node allowed: a node that may fail again is better than none."""
    text = (
        f"the workers found no node within {limit} s without the avoided {', '.join(avoided[:5])} (each "
        f"{bad_nodes.AVOIDED}), which are allowed again"
    )
    return Decision(
        Outcome("resume", "AvoidedNodesAllowed", text, at_once=True),
        record={"node_failures": bad_nodes.allowed_again(context.status), "lost_nodes": []},
    )


def _start_deadline(context: ReconcileContext, stage: Stage) -> Decision:
    limit = context.run.spec.run_policy.start_deadline_seconds
    decision = Decision()
    for pod in context.workers:
        if not (stage.waits_for(pod.rank) and pod.unstarted) or pod.start_time is None:
            continue
        left = limit - (context.now - pod.start_time).total_seconds()
        if left <= 0:
            text = _not_started(context, pod, limit)
            stalled = Decision(Outcome("stall", "StartDeadlineExceeded", text))
            return decision | (elastic.after_failed_start(context, stage, text) or stalled)
        decision |= Decision(wait=left)
    return decision


def _not_started(context: ReconcileContext, pod: Pod, limit: int) -> str:
    found = startup_problem([pod], context.run.spec, context.run.namespace)
    missing = found.message if found else missing_prerequisite(pod, context.run.spec)
    cause = missing or f"its container waits: {pod.waiting_reason or 'no reason given'}"
    text = f"pod {pod.name} on node {pod.node} did not start within {limit} s (spec.runPolicy.startDeadlineSeconds)"
    return f"{text}: {cause}"


def _needs_node(pod: Pod) -> bool:
    return pod.phase == "Pending" and pod.node is None and not pod.scheduling_gated and not pod.finished

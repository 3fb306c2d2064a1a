"""End attempts whose workers are not scheduled or started in time, as scheduled workers hold GPUs meanwhile.

The attempt ends, which frees them, and the next one is made after a pause that grows: two groups that each have half
of the nodes do not wait for each other for ever. A pod held back by a queue holds nothing, and may wait.
"""

from internvl_operator.core.context import ReconcileContext
from internvl_operator.core.observe import Pod
from internvl_operator.core.policies import run_policy
from internvl_operator.core.policies.failure_policy import Outcome
from internvl_operator.core.policies.startup_problems import startup_problem, what_is_missing
from internvl_operator.core.stages import Stage


def exceeded(context: ReconcileContext, stage: Stage) -> Outcome | None:
    """The outcome of an attempt whose pods miss a deadline to start; None while there is time."""
    return _unscheduled(context, stage) or _not_started(context) if context.created(stage) else None


def _unscheduled(context: ReconcileContext, stage: Stage) -> Outcome | None:
    limit, status = context.run.spec.run_policy.scheduling_deadline_seconds, context.status
    unscheduled = [pod for pod in context.workers if _needs_node(pod)]
    if limit is None or not unscheduled:
        status.unscheduled_since = None
        return None
    status.unscheduled_since = status.unscheduled_since or context.timestamp()
    left = run_policy.left(status.unscheduled_since, limit, context.now)
    if left:
        context.wait(left)
        return None
    pod = next((pod for pod in unscheduled if pod.unschedulable), unscheduled[0])
    reason = pod.unschedulable or "no reason from the scheduler"
    scheduled = f"{len(context.workers) - len(unscheduled)} of {stage.size(context.run.spec)} workers"
    text = (
        f"pod {pod.name} found no node within {limit} s (spec.runPolicy.schedulingDeadlineSeconds): {reason}; "
        f"releasing the {scheduled} that were scheduled"
    )
    return Outcome("stall", "SchedulingDeadlineExceeded", text)


def _not_started(context: ReconcileContext) -> Outcome | None:
    limit = context.run.spec.run_policy.start_deadline_seconds
    for pod in context.workers:
        if pod.phase != "Pending" or pod.finished or pod.start_time is None:
            continue
        left = limit - (context.now - pod.start_time).total_seconds()
        if left > 0:
            context.wait(left)
            continue
        found = startup_problem([pod], context.run.spec.secrets, context.run.namespace)
        missing = found.message if found else what_is_missing(pod, context.run.spec)
        cause = missing or f"its container waits: {pod.waiting_reason or 'no reason given'}"
        text = f"pod {pod.name} on node {pod.node} did not start within {limit} s (spec.runPolicy.startDeadlineSeconds)"
        return Outcome("stall", "StartDeadlineExceeded", f"{text}: {cause}")
    return None


def _needs_node(pod: Pod) -> bool:
    return pod.phase == "Pending" and pod.node is None and not pod.scheduling_gated and not pod.finished

"""Groups that wait too long to begin, while those of their pods that have a node hold its GPUs.

The attempt ends, which frees them, and the next one is made after a pause that grows: two groups that each have half
of the nodes do not wait for each other for ever. A pod held back by a queue holds nothing, and may wait.
"""

from internvl_operator.core.context import Draft
from internvl_operator.core.observe import Pod
from internvl_operator.core.policies import run_policy
from internvl_operator.core.policies.failure_policy import Outcome
from internvl_operator.core.policies.slow_start import what_is_missing
from internvl_operator.core.policies.startup_problems import trouble
from internvl_operator.core.stages import Stage


def overdue(draft: Draft, stage: Stage) -> Outcome | None:
    """The end of an attempt whose pods do not all start in time; None while there is time, or nothing to wait for."""
    return _unscheduled(draft, stage) or _not_started(draft) if draft.created(stage) else None


def _unscheduled(draft: Draft, stage: Stage) -> Outcome | None:
    limit, status = draft.run.spec.run_policy.scheduling_deadline_seconds, draft.status
    homeless = [pod for pod in draft.members if _needs_node(pod)]
    if limit is None or not homeless:
        status.unscheduled_since = None
        return None
    status.unscheduled_since = status.unscheduled_since or draft.timestamp()
    left = run_policy.left(status.unscheduled_since, limit, draft.now)
    if left:
        draft.wait(left)
        return None
    pod = next((pod for pod in homeless if pod.unschedulable), homeless[0])
    text = (
        f"pod {pod.name} found no node within {limit} s (spec.runPolicy.schedulingDeadlineSeconds): "
        f"{pod.unschedulable or 'the scheduler says nothing of it'}; {len(draft.members) - len(homeless)} of "
        f"{stage.size(draft.run.spec)} workers had one, and free it"
    )
    return Outcome("stall", "SchedulingDeadlineExceeded", text)


def _not_started(draft: Draft) -> Outcome | None:
    limit = draft.run.spec.run_policy.start_deadline_seconds
    for pod in draft.members:
        if pod.phase != "Pending" or pod.finished or pod.accepted_at is None:
            continue
        left = limit - (draft.now - pod.accepted_at).total_seconds()
        if left > 0:
            draft.wait(left)
            continue
        found = trouble([pod], draft.run.spec.secrets, draft.run.namespace)
        missing = found.message if found else what_is_missing(pod, draft.run.spec)
        cause = missing or f"its container waits: {pod.waiting_reason or 'no reason given'}"
        text = f"pod {pod.name} on node {pod.node} did not start within {limit} s (spec.runPolicy.startDeadlineSeconds)"
        return Outcome("stall", "StartDeadlineExceeded", f"{text}: {cause}")
    return None


def _needs_node(pod: Pod) -> bool:
    return pod.phase == "Pending" and pod.node is None and not pod.gated and not pod.finished

"""The pass: (run, observed children, now) -> Plan. Pure; every trigger ends here.

Decided here, so that a reader need not guess:
- The pods of a stage that is done stay until the run goes (ttlSecondsAfterFinished, or deletion), as those of a
  Kubernetes Job do: they hold no GPU, and their logs can be read. cleanPodPolicy: All ends that with the run.
- A changed podTemplate, secrets or scheduling restarts the current stage; any other change but runPolicy's starts the
  pipeline again, where the trainer skips at once what the change does not touch. Neither costs a restart.
- A run that is Complete stays complete whatever becomes of its spec; its Ready condition says that a change had no
  effect. One that Failed is tried again, with a full budget, as soon as its spec changes.
- activeDeadlineSeconds counts from startedAt, which a resumed run sets anew, as a Kubernetes Job does.
"""

from datetime import datetime

from internvl_api.status import Progress, Restarts, Workers

from internvl_operator.core import attempt, progress, stages
from internvl_operator.core.conditions import is_true, restate
from internvl_operator.core.context import Draft
from internvl_operator.core.observe import Observed
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.plan import Plan, Ref
from internvl_operator.core.policies import oom_policy, run_policy
from internvl_operator.core.policies.failure_policy import Outcome
from internvl_operator.core.policies.startup_problems import trouble
from internvl_operator.core.resources import gang
from internvl_operator.core.run import Run
from internvl_operator.core.stages import Stage

_NO_EFFECT = "; spec has changed since, without effect: create another resource for another result"


def reconcile(run: Run, observed: Observed, now: datetime, config: OperatorConfig) -> Plan:
    """What to make, delete and answer. Never raises on what a user or a cluster may hold."""
    if run.deleting:
        return Plan()  # owner references take the children along
    draft = Draft.begin(run, observed, now, config)
    if _stays_finished(run):
        _keep_finished(draft)
    elif error := run.mistake:
        draft.say("Stalled", error.reason, f"{error.field}: {error.message}")
    elif words := gang.not_enabled(run.spec.scheduling, config):
        draft.say("Stalled", "GangNotEnabled", words)
    else:
        _follow_spec(draft)
        _advance(draft)
    return draft.plan()


def rejected(run: Run, reason: str, message: str, now: datetime, config: OperatorConfig) -> Plan:
    """The answer when the API server refused a child: status as before, and Stalled with the server's words."""
    draft = Draft.begin(run, Observed(), now, config)
    draft.status.attempt = run.status.attempt
    draft.say("Stalled", reason, message)
    return draft.plan()


def _stays_finished(run: Run) -> bool:
    status = run.status
    if is_true(status.conditions, "Complete"):
        return True
    return is_true(status.conditions, "Failed") and status.observed_generation == run.generation


def _keep_finished(draft: Draft) -> None:
    """Answer to a changed spec; delete the pods that cleanPodPolicy names, and the CR when its time has come."""
    run, status = draft.run, draft.status
    changed = status.run_digest not in (None, run.run_digest)
    status.conditions = restate(status.conditions, run.generation, _NO_EFFECT, noted=changed)
    spec = run.resolved.spec
    clean = spec.run_policy.clean_pod_policy if spec else "Running"
    if clean != "None":
        draft.remove([pod for pod in draft.own_pods if clean == "All" or pod.active])
    if spec is None:
        return
    left = run_policy.ttl_left(draft.run.spec.run_policy, draft.status, draft.now)
    if left is None:
        return
    if left > 0:
        draft.wait(left)
    else:
        draft.delete[draft.run.uid] = Ref("InternVLFineTune", draft.run.name, draft.run.uid)


def _follow_spec(draft: Draft) -> None:
    """Take a changed spec into account before anything else is decided."""
    run, status = draft.run, draft.status
    if status.observed_generation not in (None, run.generation):
        status.retry_at, status.failures, status.infrastructure_failures = None, 0, 0
    stage = draft.stage
    if stage and draft.entry(stage).state == "Failed":  # and its spec has changed since
        status.restarts, status.started_at, status.finished_at = Restarts(), None, None
        draft.entry(stage).state = "Pending"
        _close_attempt(draft)
    if status.run_digest not in (None, run.run_digest):
        _close_attempt(draft)
        status.stages, status.artifacts = stages.fresh(run.spec), {}
        status.evaluation = status.micro_batch_size = None
        status.progress = status.progress_text = status.checkpoint = None
    if any((pod.run_digest, pod.pod_digest) != (run.run_digest, run.pod_digest) for pod in draft.members):
        _close_attempt(draft)
    status.run_digest = run.run_digest


def _close_attempt(draft: Draft) -> None:
    """Turn what was made of the current attempt into leftovers; an attempt that made nothing is still good."""
    stage = draft.stage
    if stage and (draft.members or draft.created(stage)):
        draft.entry(stage).state = "Pending"
        attempt.next_attempt(draft)


def _advance(draft: Draft) -> None:
    """Go through the stages that have succeeded; act on the first that has not."""
    while stage := draft.stage:
        progress.harvest(draft)
        ended = attempt.outcome(draft, stage)
        if ended is None or ended.kind != "succeeded":
            _act(draft, stage, ended)
            return
        _succeed(draft, stage)
    _complete(draft)


def _act(draft: Draft, stage: Stage, ended: Outcome | None) -> None:
    policy = draft.run.spec.run_policy
    left = run_policy.deadline_left(policy, draft.status, draft.now)
    if policy.suspend:
        _suspend(draft, stage)
    elif left is not None and left <= 0:
        found = trouble(draft.members, draft.run.spec.secrets, draft.run.namespace)
        _fail(draft, stage, run_policy.deadline_exceeded(policy.active_deadline_seconds, found))
    elif ended is None:
        _go_on(draft, stage)
    else:
        ended = run_policy.with_change(ended, stage.name, _smaller_micro_batch(draft), policy)
        ended = run_policy.within_budget(ended, draft.status, policy)
        (_fail if ended.kind == "fail" else attempt.end_attempt)(draft, stage, ended)
    if left and draft.status.phase not in ("Failed", "Suspended"):
        draft.wait(left)


def _smaller_micro_batch(draft: Draft) -> int | None:
    run_config = draft.run.resolved.run_config
    return oom_policy.smaller(run_config, draft.status) if run_config else None


def _go_on(draft: Draft, stage: Stage) -> None:
    if draft.created(stage) and draft.members:
        attempt.watch(draft, stage)
    else:
        attempt.start(draft, stage)


def _suspend(draft: Draft, stage: Stage) -> None:
    """Every pod is asked to go with its grace period, in which a worker saves a checkpoint."""
    _close_attempt(draft)
    draft.remove(draft.leftovers)
    draft.status.workers, draft.status.retry_at, draft.status.failures = Workers(), None, 0
    draft.status.started_at = None  # the deadline counts anew
    leaving = len(draft.leftovers)
    text = f"{leaving} pods are saving their state and leaving" if leaving else "no pod is held"
    draft.say("Suspended", "Suspended", f"spec.runPolicy.suspend is true; {text}")


def _succeed(draft: Draft, stage: Stage) -> None:
    entry = draft.entry(stage)
    entry.state, entry.finished_at, entry.reason, entry.message = "Succeeded", draft.timestamp(), None, None
    entry.attempt = draft.status.attempt
    draft.status.failures, draft.status.infrastructure_failures, draft.status.retry_at = 0, 0, None
    draft.status.progress_at = draft.status.unscheduled_since = draft.status.progress_text = None
    draft.status.workers, draft.status.containers = attempt.count(draft), []


def _complete(draft: Draft) -> None:
    draft.status.finished_at = draft.timestamp()
    draft.status.retry_at = None
    draft.status.workers = Workers(succeeded=1)
    draft.status.progress_text = progress.figures(draft.status.progress or Progress())
    draft.say("Succeeded", "Published", f"published at {draft.run.spec.output}")
    _keep_finished(draft)


def _fail(draft: Draft, stage: Stage, ended: Outcome) -> None:
    entry = draft.entry(stage)
    entry.state, entry.finished_at = "Failed", draft.timestamp()
    entry.reason, entry.message = ended.reason, ended.message
    draft.status.finished_at, draft.status.retry_at = draft.timestamp(), None
    draft.status.workers = attempt.count(draft)
    draft.say("Failed", ended.reason, ended.message)
    _keep_finished(draft)

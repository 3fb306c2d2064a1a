"""Train with fewer workers while the cluster has no room for all of them, and with all of them again later.

The group shrinks when its pods find no node in time, when a quota refuses some of them, or when a queue does not admit
it in time. It never has fewer workers than spec.minWorkers. It grows by a try: after growAfterSeconds, and directly
after a new checkpoint, the attempt ends (its workers save their state) and the next one has all workers. A try that
finds no room, or in which some workers never start, ends with as many workers as had a place. Each failed try doubles
the wait.
"""

from datetime import timedelta

from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.status import ElasticStatus

from internvl_operator.core import group_size
from internvl_operator.core.context import ReconcileContext
from internvl_operator.core.policies import run_policy
from internvl_operator.core.policies.outcome import Decision, Outcome
from internvl_operator.core.stages import Stage
from internvl_operator.core.timestamps import to_text

REDUCED, GROWING = "WorkersReduced", "WorkersGrowing"
_SCHEDULING_SECONDS = 60  # default of schedulingDeadlineSeconds with minWorkers
_LONGEST_WAIT = 86_400  # seconds between two tries


def scheduling_deadline(spec: InternVLFineTuneSpec) -> int | None:
    """Seconds that the pods of a group may wait for nodes; None: without limit."""
    given = spec.run_policy.scheduling_deadline_seconds
    return _SCHEDULING_SECONDS if given is None and spec.min_workers is not None else given


def reduced(context: ReconcileContext, stage: Stage, room: int, why: str, reason: str = REDUCED) -> Decision | None:
    """End the attempt and start again with at most `room` workers; None when the group may not get that small.

    `why`: what keeps the group from having all of its workers.
    """
    spec, status = context.run.spec, context.status
    wanted = context.run.wanted_workers or spec.workers
    size = group_size.fitting(spec, wanted, room)
    if size is None or not stage.parallel or size >= stage.size(spec):
        return None
    known = status.elastic
    failed = known.failed_growths if known else 0
    if known and known.growing_from is not None:
        failed = failed + 1 if size <= known.growing_from else 0
    grow_at = None
    later = "; it keeps this number, because leaving the queue would give its place away"
    if spec.scheduling.gang != "kueue":
        wait = min(_LONGEST_WAIT, spec.run_policy.grow_after_seconds * 2 ** min(failed, 30))
        grow_at = to_text(context.now + timedelta(seconds=wait))
        later = f"; it tries all of them again at its first checkpoint after {grow_at}"
    text = f"{why}; {stage.name} goes on with {size} of {wanted} workers and the same global batch{later}"
    elastic = ElasticStatus(
        workers=size,
        wanted=wanted,
        reason=reason,
        message=text,
        grow_at=grow_at,
        checkpoint_step=status.checkpoint.step if status.checkpoint else None,
        failed_growths=failed,
    )
    # Sizes only fall between two tries to grow, so a start without a pause cannot loop.
    return Decision(Outcome("resume", REDUCED, text, at_once=True), record={"elastic": elastic})


def after_refusal(context: ReconcileContext, stage: Stage, reason: str, message: str) -> Decision:
    """Start again with the workers that a quota admitted; an empty decision when they are too few."""
    if reason != "QuotaExceeded":
        return Decision()
    return reduced(context, stage, len(context.workers), message, reason) or Decision()


def after_failed_start(context: ReconcileContext, stage: Stage, why: str) -> Decision | None:
    """End a try to grow when some workers never start: a smaller group has trained before. None outside of a try."""
    known = context.status.elastic
    if known is None or known.growing_from is None:
        return None
    return reduced(context, stage, sum(not pod.unstarted for pod in context.workers), why)


def growth(context: ReconcileContext, stage: Stage) -> Decision:
    """End an attempt with fewer workers to try all of them, or note that all of them train."""
    elastic, status, spec = context.status.elastic, context.status, context.run.spec
    if elastic is None:
        return Decision()
    if elastic.growing_from is not None or elastic.workers >= elastic.wanted:
        all_run = sum(pod.running for pod in context.workers) == stage.size(spec)
        return Decision(record={"elastic": None}) if stage.parallel and all_run else Decision()
    if elastic.grow_at is None or stage.name != "train" or context.entry(stage).state != "Running":
        return Decision()
    left = run_policy.seconds_until(elastic.grow_at, context.now)
    if 0 < left <= _LONGEST_WAIT:  # a later time was written by a wrong clock
        return Decision(wait=left)
    known = -1 if elastic.checkpoint_step is None else elastic.checkpoint_step
    if status.checkpoint is None or status.checkpoint.step <= known:
        return Decision()  # the pass that records the next checkpoint decides
    eta = status.progress.eta_seconds if status.progress else None
    if eta is not None and eta < spec.run_policy.grow_after_seconds:
        return Decision()  # the restart would cost more than it gains
    text = (
        f"train has had {elastic.workers} of {elastic.wanted} workers; they save their state, and the next attempt "
        f"tries all {elastic.wanted}"
    )
    tried = elastic.model_copy(update={"workers": elastic.wanted, "growing_from": elastic.workers, "grow_at": None})
    return Decision(Outcome("resume", GROWING, text), record={"elastic": tried})

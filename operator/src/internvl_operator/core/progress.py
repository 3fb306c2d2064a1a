"""Copy what pods report into status: progress, checkpoint, evaluation and artifacts."""

from internvl_api.status import Bandwidth, CheckpointStatus, EvaluationStatus, Progress

from internvl_operator.core.context import ReconcileContext
from internvl_operator.core.telemetry import clean_text

_COLUMN = 120  # characters of the Progress column
_ONLY_WHILE_RUNNING = (
    "detail",
    "samples_per_second",
    "tokens_per_second",
    "eta_seconds",
    "slowest_rank",
    "peak_memory_bytes",
)
_OF_TRAINING = ("warning", "best_step", "best_validation_loss", "exported_step", "ended_early")
_ARTIFACTS = 256  # names in status; a run that reports ever new ones gets no more


def collect(context: ReconcileContext) -> None:
    """Copy what the current workers reported: live progress of node rank 0, then each pod's termination message."""
    live = context.observed.live
    for pod in context.workers:
        if live and live.pod_uid == pod.uid and not pod.finished:
            _take(context, live.progress, live.checkpoint)
        if pod.result:
            _take(context, pod.result.progress if pod.rank == 0 else None, pod.result.checkpoint)
            _take_artifacts(context, pod.result.artifacts)
            if pod.result.evaluation:
                _take_figures(context, pod.result.evaluation)
    for pod in context.old_pods:  # a deleted worker saves its state before it ends
        if pod.result:
            _take(context, None, pod.result.checkpoint)


def between_workers(context: ReconcileContext) -> None:
    """Keep the figures of training, and drop those that only a running worker has: what it does, and how fast."""
    status = context.status
    if status.progress is not None:
        status.progress = status.progress.model_copy(update=dict.fromkeys(_ONLY_WHILE_RUNNING))
        status.progress_text = figures(status.progress)


def text(progress: Progress) -> str | None:
    """For the Progress column: `120/400 loss 1.234`, or what the stage is doing.

    >>> text(Progress(step=120, total_steps=400, loss=1.23449))
    '120/400 loss 1.234'
    >>> text(Progress(step=400, total_steps=400, loss=0.5, stage="publish", detail="uploading"))
    'uploading'
    """
    if progress.stage not in (None, "train"):  # steps and loss are from an earlier stage
        return _line(progress.detail)
    return figures(progress) or _line(progress.detail)


def _line(detail: str | None) -> str | None:
    return " ".join(clean_text(detail, _COLUMN).split()) or None


def figures(progress: Progress) -> str | None:
    """Steps and loss; None before the first step."""
    if progress.step is None:
        return None
    steps = f"{progress.step}/{progress.total_steps}" if progress.total_steps else f"step {progress.step}"
    return steps if progress.loss is None else f"{steps} loss {progress.loss:.3f}"


def _take_artifacts(context: ReconcileContext, made: dict[str, str]) -> None:
    """Record artifacts under their stage and by name; a published artifact replaces its source of the same name."""
    if context.stage and made:
        known = context.status.artifacts
        room = max(0, _ARTIFACTS - len(known))
        new = [name for name in made if name not in known][:room]
        made = {name: uri for name, uri in made.items() if name in known or name in new}
        entry = context.entry(context.stage)
        entry.artifacts = entry.artifacts | made
        context.status.artifacts = context.status.artifacts | made


def _moved(old: Progress, new: Progress) -> bool:
    return (old.stage, old.step, old.detail) != (new.stage, new.step, new.detail)


def _take_figures(context: ReconcileContext, measured: EvaluationStatus) -> None:
    old = context.status.evaluation or EvaluationStatus()
    context.status.evaluation = EvaluationStatus(
        baseline=measured.baseline or old.baseline, final=measured.final or old.final
    )


def _steady(old: Bandwidth | None, new: Bandwidth) -> Bandwidth | None:
    """The new bandwidths; a rate within a fifth of the old one stays the old, so that status and Events stay quiet."""
    known = old.model_dump(exclude_none=True) if old else {}
    rates = {
        name: known[name] if name in known and abs(rate - known[name]) <= known[name] / 5 else rate
        for name, rate in new.model_dump(exclude_none=True).items()
    }
    return Bandwidth(**rates) if rates else old


def _take(context: ReconcileContext, progress: Progress | None, checkpoint: CheckpointStatus | None) -> None:
    status = context.status
    if progress is not None:
        old = status.progress or Progress()
        # Later stages report no steps: keep the figures of training.
        news = progress.model_dump(exclude_none=True) | {"slowest_rank": progress.slowest_rank}
        if progress.stage == "train":  # also None: a run that starts again has none of these yet
            news |= {name: getattr(progress, name) for name in _OF_TRAINING}
        if progress.bandwidth is not None:
            news["bandwidth"] = _steady(old.bandwidth, progress.bandwidth)
        status.progress = old.model_copy(update=news)
        if status.progress_at is None or _moved(old, status.progress):
            status.progress_at = context.timestamp()
        status.progress_text = text(status.progress)
    if checkpoint is not None and (status.checkpoint is None or checkpoint.step > status.checkpoint.step):
        status.checkpoint = checkpoint
        status.failures = status.infrastructure_failures = 0

"""What the pods say about themselves -> status.progress, checkpoint, evaluation and artifacts."""

from internvl_api.status import CheckpointStatus, EvaluationStatus, Progress

from internvl_operator.core.context import Draft


def harvest(draft: Draft) -> None:
    """Copy what the current members said: live progress of node rank 0, then each pod's last word."""
    live = draft.observed.live
    for pod in draft.members:
        if live and live.pod_uid == pod.uid and not pod.finished:
            _take(draft, live.progress, live.checkpoint)
        if pod.result:
            _take(draft, pod.result.progress if pod.rank == 0 else None, pod.result.checkpoint)
            _take_artifacts(draft, pod.result.artifacts)
            if pod.result.evaluation:
                _take_figures(draft, pod.result.evaluation)
    for pod in draft.leftovers:  # a worker that was asked to go saved its state on the way
        if pod.result:
            _take(draft, None, pod.result.checkpoint)


def text(progress: Progress) -> str | None:
    """For the Progress column: `120/400 loss 1.234`, or what the stage is doing.

    >>> text(Progress(step=120, total_steps=400, loss=1.23449))
    '120/400 loss 1.234'
    >>> text(Progress(step=400, total_steps=400, loss=0.5, stage="publish", detail="uploading"))
    'uploading'
    """
    if progress.stage not in (None, "train"):  # the figures are of an earlier stage
        return progress.detail
    return figures(progress) or progress.detail


def figures(progress: Progress) -> str | None:
    """Steps and loss, where there are any."""
    if progress.step is None:
        return None
    steps = f"{progress.step}/{progress.total_steps}" if progress.total_steps else f"step {progress.step}"
    return steps if progress.loss is None else f"{steps} loss {progress.loss:.3f}"


def _take_artifacts(draft: Draft, made: dict[str, str]) -> None:
    """Under the stage that made them, and by name: what is published takes the place of what it was made of."""
    if draft.stage and made:
        entry = draft.entry(draft.stage)
        entry.artifacts = entry.artifacts | made
        draft.status.artifacts = draft.status.artifacts | made


def _moved(old: Progress, new: Progress) -> bool:
    return (old.stage, old.step, old.detail) != (new.stage, new.step, new.detail)


def _take_figures(draft: Draft, measured: EvaluationStatus) -> None:
    old = draft.status.evaluation or EvaluationStatus()
    draft.status.evaluation = EvaluationStatus(
        baseline=measured.baseline or old.baseline, final=measured.final or old.final
    )


def _take(draft: Draft, progress: Progress | None, checkpoint: CheckpointStatus | None) -> None:
    status = draft.status
    if progress is not None:
        old = status.progress or Progress()
        # A later stage has no steps of its own: the figures of training stay.
        news = progress.model_dump(exclude_none=True) | {"slowest_rank": progress.slowest_rank}
        status.progress = old.model_copy(update=news)
        if status.progress_at is None or _moved(old, status.progress):
            status.progress_at = draft.timestamp()
        status.progress_text = text(status.progress)
    if checkpoint is not None and (status.checkpoint is None or checkpoint.step > status.checkpoint.step):
        status.checkpoint = checkpoint
        status.failures = status.infrastructure_failures = 0

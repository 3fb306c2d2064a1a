"""The grace period of training workers, from the rate at which the run stores checkpoints.

Until a run has measured its storage, `recipes.resolve` assumes a rate. status.progress.bandwidth has the measured one;
the pods and run.yaml of the next attempt use it.
"""

from dataclasses import replace

from internvl_api.memory.stop_time import grace_seconds
from internvl_api.status import InternVLFineTuneStatus

from internvl_operator.core.run import Run


def storage_rate(status: InternVLFineTuneStatus | None) -> float | None:
    """Bytes that the slowest node of the run stores in a second; None before the run has measured it."""
    progress = status.progress if status else None
    return progress.bandwidth.storage_write if progress and progress.bandwidth else None


def with_measured_grace(run: Run) -> Run:
    """The run with the grace period that its measured storage needs; the same object when that changes nothing.

    What was measured for another spec does not count: it may have another output.
    """
    spec, run_config, rate = run.resolved.spec, run.resolved.run_config, storage_rate(run.status)
    if spec is None or run_config is None or rate is None or run.status.run_digest != run.run_digest:
        return run
    grace = grace_seconds(spec.pod_template.termination_grace_period_seconds, run_config, rate)
    if grace == run_config.grace_seconds:
        return run
    changed = run_config.model_copy(update={"grace_seconds": grace})
    return replace(run, resolved=run.resolved._replace(run_config=changed, run_yaml=""))

"""A retry with a change: the same global batch, taken in smaller micro batches, after a GPU ran out of memory.

The result stays what it was (to rounding), and checkpoints of the larger micro batch are resumed from.
"""

from internvl_api.run_config import RunConfig
from internvl_api.status import InternVLFineTuneStatus

from internvl_operator.core.run import Run


def smaller(run_config: RunConfig, status: InternVLFineTuneStatus) -> int | None:
    """At most half of what the last attempt used, and still a divisor of a rank's samples; None when that was 1."""
    share = run_config.training.micro_batch_size * run_config.gradient_accumulation
    half = current(run_config, status) // 2
    return next((size for size in range(half, 0, -1) if share % size == 0), None)


def current(run_config: RunConfig, status: InternVLFineTuneStatus) -> int:
    """The micro batch of the current attempt: the spec's, or the smaller one that status remembers."""
    known, share = status.micro_batch_size, run_config.training.micro_batch_size * run_config.gradient_accumulation
    return (
        known
        if known and known < run_config.training.micro_batch_size and share % known == 0
        else (run_config.training.micro_batch_size)
    )


def run_yaml(run: Run, status: InternVLFineTuneStatus) -> str:
    """The text of run.yaml for the current attempt."""
    run_config = run.resolved.run_config
    if run_config is None or current(run_config, status) == run_config.training.micro_batch_size:
        return run.resolved.run_yaml
    size = current(run_config, status)
    accumulation = run_config.gradient_accumulation * run_config.training.micro_batch_size // size
    training = run_config.training.model_copy(update={"micro_batch_size": size})
    return run_config.model_copy(update={"training": training, "gradient_accumulation": accumulation}).to_yaml()

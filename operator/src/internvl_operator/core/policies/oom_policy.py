"""After GPU out of memory: retry with smaller micro batches and the same global batch, or fail.

The result is the same up to rounding, and checkpoints of the larger micro batch can be resumed.
"""

from collections.abc import Sequence
from dataclasses import replace

from internvl_api.quantity import gib
from internvl_api.run_config import RunConfig
from internvl_api.spec import RunPolicy
from internvl_api.status import InternVLFineTuneStatus, StageName

from internvl_operator.core.observe import Pod
from internvl_operator.core.policies.outcome import Outcome
from internvl_operator.core.run import Run


def decide(outcome: Outcome, stage: StageName, smaller: int | None, policy: RunPolicy) -> Outcome:
    """The outcome after GPU out of memory: a smaller micro batch for the next attempt, or a failure.

    `smaller`: the next smaller micro batch; None when the current one is 1. An unchanged retry would fail at the same
    step, because the order of rows is fixed.
    """
    if outcome.kind != "change":
        return outcome
    if stage == "doctor":  # it needs next to nothing: somebody else's process holds the GPU's memory
        text = f"{outcome.message}; the doctor itself needs little, so look for other processes on that GPU"
        return Outcome("retry", outcome.reason, text, "infrastructure")
    if stage != "train":
        advice = "; lower spec.evaluation.batchSize" if stage in ("baseline-evaluate", "evaluate") else ""
        return Outcome("fail", outcome.reason, outcome.message + advice)
    if smaller is None:
        text = f"{outcome.message}; the micro batch cannot get smaller: lower spec.training.maxSeqLength or "
        return Outcome("fail", outcome.reason, text + "spec.image.maxDynamicPatch, or raise spec.training.zeroStage")
    if policy.on_out_of_memory == "fail":
        text = f"{outcome.message}; lower spec.training.microBatchSize to {smaller} (the global batch stays), or set "
        return Outcome("fail", outcome.reason, text + "spec.runPolicy.onOutOfMemory: halveMicroBatch")
    text = f"{outcome.message}; the next attempt uses micro batches of {smaller} and the same global batch"
    return Outcome("change", outcome.reason, text)


def with_peak(outcome: Outcome, workers: Sequence[Pod], status: InternVLFineTuneStatus) -> Outcome:
    """The outcome; for host out of memory of worker 0, with the peak that it last reported."""
    peak = status.progress.peak_memory_bytes if status.progress else None
    killed = any(pod.rank == 0 and pod.exit_reason == "OOMKilled" for pod in workers)
    if outcome.reason != "OutOfMemory" or peak is None or not killed:
        return outcome
    return replace(outcome, message=f"{outcome.message} (it last reported a peak of {gib(peak)})")


def smaller_micro_batch(run_config: RunConfig, status: InternVLFineTuneStatus) -> int | None:
    """The largest divisor of a rank's samples up to half the last micro batch; None when that was 1."""
    share = run_config.training.micro_batch_size * run_config.gradient_accumulation
    half = current_micro_batch(run_config, status) // 2
    return next((size for size in range(half, 0, -1) if share % size == 0), None)


def current_micro_batch(run_config: RunConfig, status: InternVLFineTuneStatus) -> int:
    """The micro batch of the current attempt: the spec's, or the smaller one that status remembers."""
    largest, known = run_config.training.micro_batch_size, status.micro_batch_size
    if not known or known >= largest:
        return largest
    share = largest * run_config.gradient_accumulation  # another one than before when the number of workers changed
    return next((size for size in range(known, 0, -1) if share % size == 0), largest)


def attempt_config(run_config: RunConfig, status: InternVLFineTuneStatus) -> RunConfig:
    """The RunConfig of the current attempt, with its micro batch; the same object when that is the spec's."""
    size = current_micro_batch(run_config, status)
    if size == run_config.training.micro_batch_size:
        return run_config
    accumulation = run_config.gradient_accumulation * run_config.training.micro_batch_size // size
    training = run_config.training.model_copy(update={"micro_batch_size": size})
    return run_config.model_copy(update={"training": training, "gradient_accumulation": accumulation})


def run_yaml(run: Run, status: InternVLFineTuneStatus) -> str:
    """The text of run.yaml for the current attempt."""
    run_config = run.resolved.run_config
    if run_config is None:
        return run.resolved.run_yaml
    config = attempt_config(run_config, status)
    return (run.resolved.run_yaml if config is run_config else "") or config.to_yaml(reveal=True)

"""After a GPU ran out of memory: retry with smaller micro batches and the same global batch, or fail.

The result is the same (to rounding), and checkpoints of the larger micro batch can be resumed.
"""

from internvl_api.run_config import RunConfig
from internvl_api.spec import RunPolicy
from internvl_api.status import InternVLFineTuneStatus, StageName

from internvl_operator.core.policies.outcome import Outcome
from internvl_operator.core.run import Run


def decide(outcome: Outcome, stage: StageName, smaller: int | None, policy: RunPolicy) -> Outcome:
    """The outcome after a GPU ran out of memory: a change for the next attempt, or a failure where none is allowed.

    `smaller`: the next smaller micro batch, None when there is none. Trying again unchanged would end the same way,
    as the order of rows is fixed.
    """
    if outcome.kind != "change":
        return outcome
    if stage != "train":
        return Outcome("fail", outcome.reason, f"{outcome.message}; lower spec.evaluation.batchSize")
    if smaller is None:
        text = f"{outcome.message}; the micro batch cannot be made smaller: lower spec.training.maxSeqLength or "
        return Outcome("fail", outcome.reason, text + "spec.image.maxDynamicPatch, or raise spec.training.zeroStage")
    if policy.on_out_of_memory == "fail":
        text = f"{outcome.message}; lower spec.training.microBatchSize to {smaller} (the global batch stays), or set "
        return Outcome("fail", outcome.reason, text + "spec.runPolicy.onOutOfMemory: halveMicroBatch")
    text = f"{outcome.message}; the next attempt takes micro batches of {smaller}, and the same global batch"
    return Outcome("change", outcome.reason, text)


def smaller_micro_batch(run_config: RunConfig, status: InternVLFineTuneStatus) -> int | None:
    """At most half of what the last attempt used, and still a divisor of a rank's samples; None when that was 1."""
    share = run_config.training.micro_batch_size * run_config.gradient_accumulation
    half = current_micro_batch(run_config, status) // 2
    return next((size for size in range(half, 0, -1) if share % size == 0), None)


def current_micro_batch(run_config: RunConfig, status: InternVLFineTuneStatus) -> int:
    """The micro batch of the current attempt: the spec's, or the smaller one that status remembers."""
    largest, known = run_config.training.micro_batch_size, status.micro_batch_size
    share = largest * run_config.gradient_accumulation
    return known if known and known < largest and share % known == 0 else largest


def run_yaml(run: Run, status: InternVLFineTuneStatus) -> str:
    """The text of run.yaml for the current attempt."""
    run_config = run.resolved.run_config
    if run_config is None or current_micro_batch(run_config, status) == run_config.training.micro_batch_size:
        return run.resolved.run_yaml
    size = current_micro_batch(run_config, status)
    accumulation = run_config.gradient_accumulation * run_config.training.micro_batch_size // size
    training = run_config.training.model_copy(update={"micro_batch_size": size})
    return run_config.model_copy(update={"training": training, "gradient_accumulation": accumulation}).to_yaml()

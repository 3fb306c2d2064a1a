"""DeepSpeed's configuration of a run, equal to upstream's published JSON files in every field they set."""

from __future__ import annotations

from typing import Any

from internvl_api.recipes.files import merge
from internvl_api.run_config import RunConfig

# Bucket sizes in elements, from upstream's zero_stage1_config.json and zero_stage3_config.json.
_STAGE_1_AND_2 = {
    "allgather_partitions": True,
    "allgather_bucket_size": 1_000_000_000,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 1_000_000_000,
    "contiguous_gradients": True,
}
_STAGE_3 = {
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1_000_000_000,
    "reduce_bucket_size": 1_000_000_000,
    "stage3_prefetch_bucket_size": 1_000_000_000,
    "stage3_param_persistence_threshold": 10_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_gather_16bit_weights_on_model_save": True,
}
_ALLOCATED_BUCKETS = ("reduce_bucket_size", "allgather_bucket_size")


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The configuration for deepspeed.initialize, without optimizer and learning rate, which are ours.

    `training.deepspeed` is merged over it, object by object.
    """
    training = config.training
    stage = training.zero_stage
    # With a maximum of tokens the passes of a step differ in number; DeepSpeed is told of the most there can be.
    rows = training.micro_batch_size if training.max_tokens_per_micro_batch is None else 1
    generated = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": training.global_batch_size // (world_size * rows),
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_optimization": {"stage": stage, **(_STAGE_3 if stage == 3 else _STAGE_1_AND_2)},
        # A client optimizer with offloading (a user's override) is not one of DeepSpeed's own.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    return merge(generated, dict(training.deepspeed))


def fit_buckets(settings: dict[str, Any], trainable: int) -> dict[str, Any]:
    """The same settings with no bucket larger than all gradients together (`trainable` elements).

    DeepSpeed makes its reduce buckets at full size whatever is trained: two of 2 GB each for an adapter of 50 MB. What
    is reduced stays the same, as all gradients fit. stage3_prefetch_bucket_size allocates nothing, and stays.
    """
    whole = trainable + trainable % 2  # DeepSpeed wants an even allgather bucket
    zero = settings["zero_optimization"]
    fitted = {key: min(zero[key], whole) for key in _ALLOCATED_BUCKETS if isinstance(zero.get(key), int | float)}
    return {**settings, "zero_optimization": {**zero, **fitted}}

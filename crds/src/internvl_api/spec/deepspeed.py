"""The settings of DeepSpeed that a run may change, in DeepSpeed's own names: `training.deepspeed`.

A TypedDict like the parts of a pod: a checked value stays the dict that the user wrote. What other fields of the spec
decide, and what the trainer does itself, is in SET_ELSEWHERE and not here.
Source: deepspeed 0.19, runtime/config.py and runtime/zero/config.py.
"""

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from internvl_api.spec.kubernetes.part import part

_Elements = Annotated[int, Field(ge=0, le=10**15)]  # Helm reads numbers as float64
_Count = Annotated[int, Field(ge=0, le=65_536)]
_Path = Annotated[str, Field(min_length=1, max_length=4096, description="Folder on the node's NVMe disk")]
_PinMemory = Annotated[bool, Field(description="Use page-locked memory on the host")]
_Device = Annotated[Literal["none", "cpu", "nvme"], Field(description="Where to keep it: on the GPU, cpu or nvme")]
_Dtype = Literal["fp32", "fp16", "bf16"]


@part
class OffloadOptimizer(TypedDict, total=False):
    """Optimizer state in the host's memory or on a disk."""

    device: _Device
    nvme_path: _Path
    buffer_count: Annotated[_Count, Field(description="Number of buffers for the disk")]
    pin_memory: _PinMemory
    pipeline_read: Annotated[bool, Field(description="Read the next part while computing")]
    pipeline_write: Annotated[bool, Field(description="Write the last part while computing")]
    fast_init: Annotated[bool, Field(description="Initialise the state on the disk faster")]
    ratio: Annotated[float, Field(ge=0.0, le=1.0, description="Part of the state to offload; ZeRO-3 only")]
    super_offload: Annotated[bool, Field(description="Offload for chips with fast CPU memory; ZeRO-3 only")]
    cpuadam_cores_perc: Annotated[
        float, Field(ge=0.0, le=1.0, description="Part of the cores for the optimizer, with super_offload")
    ]


@part
class OffloadParam(TypedDict, total=False):
    """Weights in the host's memory or on a disk; ZeRO-3 only."""

    device: _Device
    nvme_path: _Path
    buffer_count: Annotated[_Count, Field(description="Number of buffers for the disk")]
    buffer_size: Annotated[_Elements, Field(description="Elements of a buffer")]
    max_in_cpu: Annotated[_Elements, Field(description="Elements to keep in memory beside the disk")]
    pin_memory: _PinMemory


@part
class ZeroOptimization(TypedDict, total=False):
    """How ZeRO shards, communicates and offloads. training.zeroStage sets the stage."""

    contiguous_gradients: Annotated[bool, Field(description="Copy gradients to one buffer as they are made")]
    reduce_scatter: Annotated[bool, Field(description="Average gradients by reduce-scatter, not all-reduce")]
    reduce_bucket_size: Annotated[_Elements, Field(description="Elements that are reduced at a time")]
    use_multi_rank_bucket_allreduce: Annotated[bool, Field(description="Join the ranks' buckets in one all-reduce")]
    allgather_partitions: Annotated[bool, Field(description="Gather weights by all-gather, not broadcasts")]
    allgather_bucket_size: Annotated[_Elements, Field(description="Elements that are gathered at a time")]
    overlap_comm: Annotated[bool, Field(description="Reduce gradients during the backward pass")]
    round_robin_gradients: Annotated[bool, Field(description="Copy gradients to the CPU by all ranks in turn")]
    ignore_unused_parameters: Annotated[bool, Field(description="Train on when a parameter gets no gradient")]
    parameter_alignment: Annotated[bool, Field(description="Align parameters to 16 bytes in flat buffers")]
    offload_optimizer: Annotated[OffloadOptimizer, Field(description="Optimizer state on CPU or disk")]
    offload_param: Annotated[OffloadParam, Field(description="Weights on CPU or disk; ZeRO-3 only")]
    sub_group_size: Annotated[_Elements, Field(description="Elements of one optimizer step; ZeRO-3 only")]
    stage3_prefetch_bucket_size: Annotated[_Elements, Field(description="Elements to gather ahead")]
    stage3_param_persistence_threshold: Annotated[
        _Elements, Field(description="Parameters with fewer elements are not sharded")
    ]
    stage3_model_persistence_threshold: Annotated[
        _Elements, Field(description="Maximum elements that are not sharded, over all parameters")
    ]
    stage3_max_live_parameters: Annotated[_Elements, Field(description="Maximum gathered elements on a GPU")]
    stage3_max_reuse_distance: Annotated[
        _Elements, Field(description="Keep a gathered parameter when it is used again within so many elements")
    ]
    stage3_gather_16bit_weights_on_model_save: Annotated[
        bool, Field(description="Gather weights when DeepSpeed saves; the trainer saves by itself")
    ]
    stage3_module_granularity_threshold: Annotated[
        _Elements, Field(description="Gather modules with finer parameters as a whole")
    ]
    stage3_use_all_reduce_for_fetch_params: Annotated[bool, Field(description="Gather parameters by all-reduce")]
    stage3_allgather_sequential: Annotated[bool, Field(description="Gather parameters one by one, to save memory")]
    zero_hpz_partition_size: Annotated[_Count, Field(description="Ranks of a second sharding group (ZeRO++)")]
    zero_quantized_weights: Annotated[bool, Field(description="Gather weights in 8 bits (ZeRO++)")]
    zero_quantized_nontrainable_weights: Annotated[bool, Field(description="Keep frozen weights in 8 bits")]
    zero_quantized_gradients: Annotated[bool, Field(description="Reduce gradients in 4 bits (ZeRO++)")]
    memory_efficient_linear: Annotated[bool, Field(description="Use DeepSpeed's linear layer; ZeRO-3 only")]
    override_module_apply: Annotated[bool, Field(description="Gather parameters in Module.apply; ZeRO-3 only")]
    log_trace_cache_warnings: Annotated[bool, Field(description="Log when the order of modules changes")]
    enable_sanity_checks: Annotated[bool, Field(description="Check DeepSpeed's own state, to find errors")]


@part
class Bf16(TypedDict, total=False):
    """How bf16 gradients are applied. training.precision enables bf16."""

    immediate_grad_update: Annotated[bool, Field(description="Add each gradient to fp32 as soon as it is made")]
    check_grad_overflow: Annotated[bool, Field(description="Skip a step whose gradients are not finite")]


@part
class DataTypes(TypedDict, total=False):
    """Number formats of buffers."""

    grad_accum_dtype: Annotated[_Dtype, Field(description="Number format of accumulated gradients")]


@part
class Aio(TypedDict, total=False):
    """Input and output of the NVMe disk."""

    block_size: Annotated[_Elements, Field(description="Bytes of one request")]
    queue_depth: Annotated[_Count, Field(description="Requests at a time")]
    intra_op_parallelism: Annotated[_Count, Field(description="Threads for one request")]
    single_submit: Annotated[bool, Field(description="Send requests one by one")]
    overlap_events: Annotated[bool, Field(description="Send requests while others end")]
    use_gds: Annotated[bool, Field(description="Read into GPU memory directly (GPUDirect Storage)")]


@part
class CommsLogger(TypedDict, total=False):
    """A log of collective operations."""

    enabled: Annotated[bool, Field(description="Write the log")]
    verbose: Annotated[bool, Field(description="Log each operation when it ends")]
    prof_all: Annotated[bool, Field(description="Log all operations, not only prof_ops")]
    debug: Annotated[bool, Field(description="Add the caller of each operation")]
    prof_ops: Annotated[
        list[Annotated[str, Field(max_length=63)]], Field(max_length=50, description="Names of operations to log")
    ]


@part
class FlopsProfiler(TypedDict, total=False):
    """A profile of one step."""

    enabled: Annotated[bool, Field(description="Write the profile")]
    profile_step: Annotated[_Elements, Field(description="Step to profile")]
    module_depth: Annotated[int, Field(ge=-1, le=1000, description="Levels of modules to show; -1: all")]
    top_modules: Annotated[_Count, Field(description="Number of modules to show at each level")]
    detailed: Annotated[bool, Field(description="Show every module")]
    output_file: Annotated[str, Field(min_length=1, max_length=4096, description="File; default: the log")]


@part
class DeepSpeed(TypedDict, total=False):
    """Settings merged over the generated DeepSpeed configuration, in DeepSpeed's own names."""

    zero_optimization: Annotated[ZeroOptimization, Field(description="How ZeRO shards, communicates and offloads")]
    bf16: Annotated[Bf16, Field(description="How bf16 gradients are applied")]
    data_types: Annotated[DataTypes, Field(description="Number formats of buffers")]
    aio: Annotated[Aio, Field(description="Input and output of the NVMe disk, for offloading")]
    comms_logger: Annotated[CommsLogger, Field(description="Log of collective operations")]
    flops_profiler: Annotated[FlopsProfiler, Field(description="Profile of one step")]
    gradient_clipping: Annotated[float, Field(ge=0.0, description="Maximum norm of the gradient; or use maxGradNorm")]
    gradient_predivide_factor: Annotated[float, Field(gt=0.0, description="Divide gradients before the average")]
    prescale_gradients: Annotated[bool, Field(description="Scale gradients before the average")]
    communication_data_type: Annotated[_Dtype, Field(description="Number format of reduced gradients")]
    disable_allgather: Annotated[bool, Field(description="Gather weights by broadcasts")]
    zero_allow_untested_optimizer: Annotated[bool, Field(description="Allow other optimizers than DeepSpeed's")]
    zero_force_ds_cpu_optimizer: Annotated[bool, Field(description="Require DeepSpeed's optimizer when offloading")]
    steps_per_print: Annotated[_Elements, Field(description="Steps between two lines of DeepSpeed's log")]
    wall_clock_breakdown: Annotated[bool, Field(description="Log the time of each part of a step")]
    memory_breakdown: Annotated[bool, Field(description="Log memory at each part of a step")]
    dump_state: Annotated[bool, Field(description="Log DeepSpeed's state when it starts")]


# What a user may look for here -> where it is set.
SET_ELSEWHERE = {
    "train_batch_size": "spec.training.globalBatchSize",
    "train_micro_batch_size_per_gpu": "spec.training.microBatchSize",
    "gradient_accumulation_steps": "spec.training.globalBatchSize and microBatchSize",
    "optimizer": "spec.training.learningRate, weightDecay, adamBetas and adamEpsilon",
    "scheduler": "spec.training.lrSchedule and warmupRatio",
    "fp16": "spec.training.precision",
    "bfloat16": "spec.training.precision",
    "enabled": "spec.training.precision",
    "stage": "spec.training.zeroStage",
    "activation_checkpointing": "spec.training.gradientCheckpointing",
    "checkpoint": "spec.checkpoint",
}

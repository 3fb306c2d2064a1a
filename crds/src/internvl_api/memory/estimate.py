"""Estimate of the GPU memory that one rank needs in training, before anything starts.

Arithmetic on the catalogue's dimensions: no checkpoint, no torch, well under a millisecond. The estimate adds up what
is in memory at the peak of a step:

    weights + gradients + optimizer state            what ZeRO shards (Rajbhandari et al. 2020, arXiv:1910.02054)
    + activations + logits                           of the rows of a micro batch
    + buffers + reserve                              of DeepSpeed, CUDA and the allocator

Accuracy: docs/memory.md compares it with the figures of InternVL's guides, and a test measures the activations of the
native layers.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from internvl_api.memory.activations import language_cost, loss_bytes, projector_held, vision_cost
from internvl_api.memory.setup import Row, Setup, longest_row, setup_of, typical_row
from internvl_api.models.catalogue import count_patches
from internvl_api.quantity import GIB
from internvl_api.run_config import RunConfig

# AdamW has three fp32 numbers for each trained parameter: master weight, first and second moment. DeepSpeed keeps a
# master copy of its partition even when the weights are fp32.
_OPTIMIZER_BYTES = 12
# CUDA context, cuBLAS workspaces and NCCL's channels.
_CONTEXT_BYTES = GIB
# Memory that the caching allocator holds beyond requests, because rows differ in length from step to step.
_FRAGMENTATION = 0.1
# NF4 with quantized scales: 4.127 bits a weight (QLoRA, Dettmers et al. 2023, section 3).
_NF4_BYTES = 4.127 / 8


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by purpose.

    Attributes:
        activations: of both towers for the backward pass, with the recomputation of one layer.
        logits: what the loss needs beyond the activations; it peaks before layers are recomputed.
        buffers: DeepSpeed's communication buffers and, under ZeRO-3, the weights gathered at one time.
        reserve: CUDA context and the allocator's fragmentation.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    reserve: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Name -> bytes, in the order of the attributes."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


Verdict = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class Estimate:
    """Memory for typical and for the longest rows, against one GPU's memory (bytes)."""

    setup: Setup
    gpu_memory: int
    typical: Memory
    longest: Memory

    @property
    def verdict(self) -> Verdict:
        """`tight`: a micro batch of typical rows fits, one of the longest rows allowed does not."""
        if self.typical.total > self.gpu_memory:
            return "does not fit"
        return "fits" if self.longest.total <= self.gpu_memory else "tight"


def estimate(config: RunConfig, gpu_memory: int) -> Estimate | None:
    """The estimate of training on GPUs of `gpu_memory` bytes; None without training or with an unknown model."""
    setup = setup_of(config) if config.trains else None
    return judge(setup, gpu_memory) if setup else None


def judge(setup: Setup, gpu_memory: int) -> Estimate:
    """The estimate of a setup on GPUs of `gpu_memory` bytes."""
    typical, longest = memory(setup, typical_row(setup)), memory(setup, longest_row(setup))
    return Estimate(setup, gpu_memory, typical, max(typical, longest, key=lambda each: each.total))


def memory(setup: Setup, row: Row) -> Memory:
    """Bytes on one GPU when every row of a micro batch is like `row`."""
    activations, logits = _activations(setup, row)
    buffers = _buffers(setup)
    # The optimizer step runs after activations and buffers are freed: only what it needs beyond them counts.
    working = activations + logits + buffers
    buffers += max(0, _step_copies(setup) - working)
    working = activations + logits + buffers
    return Memory(
        weights=_weights(setup),
        gradients=setup.element_bytes * _sharded(setup.trainable_parameters, setup, from_stage=2),
        optimizer=_optimizer(setup),
        activations=activations,
        logits=logits,
        buffers=buffers,
        reserve=_CONTEXT_BYTES + int(_FRAGMENTATION * working),
    )


def _sharded(parameters: int, setup: Setup, *, from_stage: int) -> int:
    """Parameters on one rank: ZeRO shards the optimizer state from stage 1, gradients from 2, weights from 3."""
    return -(-parameters // setup.world_size) if setup.zero_stage >= from_stage else parameters


def _weights(setup: Setup) -> int:
    """Bytes of weights. ZeRO-3 keeps matrices up to the persistence threshold, and all vectors, whole on every rank."""
    total = setup.model.parameters + setup.adapter_parameters
    if setup.zero_stage < 3:
        packed = setup.model.language.linear_parameters if setup.quantized else 0
        return setup.element_bytes * (total - packed) + int(_NF4_BYTES * packed)
    partitioned = _partitioned(setup)
    own = 0 if setup.zero.offload_parameters else _sharded(partitioned, setup, from_stage=3)
    return setup.element_bytes * (total - partitioned + own)


def _partitioned(setup: Setup) -> int:
    threshold = setup.zero.persistence_threshold
    return sum(elements * count for elements, count in setup.model.matrices() if elements > threshold)


def _optimizer(setup: Setup) -> int:
    if setup.zero.offload_optimizer:
        return 0
    return _OPTIMIZER_BYTES * _sharded(setup.trainable_parameters, setup, from_stage=1)


def _step_copies(setup: Setup) -> int:
    """Bytes of the flat copies of the partition's gradients in an optimizer step, one in fp32.

    Source: DeepSpeed, stage_1_and_2.py, `step`. ZeRO-3 copies one sub-group of at most 1e9 elements at a time.
    """
    own = _sharded(setup.trainable_parameters, setup, from_stage=1)
    if setup.zero.offload_optimizer:
        return 0
    return 4 * min(own, 1_000_000_000) if setup.zero_stage == 3 else (4 + setup.element_bytes) * own


def _buffers(setup: Setup) -> int:
    """Bytes of DeepSpeed's reduce buckets, which have full size whatever is trained.

    ZeRO-3 adds the gathered weights: up to stage3_max_live_parameters, or the largest matrix if that is more. Source:
    `setup_buckets` of DeepSpeed's optimizers.
    """
    zero = setup.zero
    buckets = zero.reduce_bucket if zero.contiguous_gradients else 0
    if zero.fitted:
        buckets = min(buckets, setup.trainable_parameters)
    if setup.zero_stage < 3:
        return setup.element_bytes * buckets * (2 if zero.overlap else 1)
    largest = max(elements for elements, _ in setup.model.matrices())
    live = min(_partitioned(setup), max(zero.max_live, largest))
    return setup.element_bytes * (buckets + live)


def _activations(setup: Setup, row: Row) -> tuple[int, int]:
    """Bytes of (activations, logits): the largest of three peaks of a step.

    1. the loss: all held activations, the logits of a chunk of supervised tokens, and the head's gradients;
    2. the backward pass of a language layer: all held activations, and those of that layer;
    3. the vision tower: its forward pass when it is frozen (it holds nothing then), else its backward pass.
    """
    model, size = setup.model, setup.element_bytes
    rows = setup.rows(row)
    tokens, supervised, tiles = (math.ceil(rows * each) for each in (row.tokens, row.supervised, row.tiles))
    language = language_cost(
        model.language, size, checkpointing=setup.gradient_checkpointing, adapter=setup.language_rank > 0
    )
    vision_learns = setup.learns_vision or setup.vision_rank > 0
    vision = vision_cost(
        model.vision,
        size,
        checkpointing=setup.gradient_checkpointing,
        learns=vision_learns,
        adapter=setup.vision_rank > 0,
    )
    patches = tiles * (count_patches(setup.tile_size) + 1)
    held_vision = patches * vision.held
    if vision_learns or setup.learns_projector:
        held_vision += tiles * setup.context_tokens * projector_held(model, size)
    held = held_vision + tokens * language.held
    loss = tokens * language.ends + loss_bytes(
        model.language, size, supervised, learns=setup.learns_language, whole=setup.whole_logits
    )
    activations = int(max(held + tokens * language.layer, held_vision + patches * vision.layer))
    return activations, max(0, int(held + loss) - activations)

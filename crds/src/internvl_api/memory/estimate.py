"""How much GPU memory one training process needs, reckoned before anything is started.

Pure arithmetic on the catalogue's dimensions: no checkpoint, no torch, well under a millisecond. The sum is of what
must be there at the worst moment of a step:

    weights + gradients + optimizer state            what ZeRO shards (Rajbhandari et al. 2020, arXiv:1910.02054)
    + activations + logits                           what the rows of a micro batch bring
    + buffers + reserve                              what DeepSpeed, CUDA and the allocator take

How near it comes: docs/memory.md compares it with the figures of InternVL's guides, and a test measures the activations
of the native layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from internvl_api.memory.activations import LOGIT_BYTES, language_cost, projector_held, vision_cost
from internvl_api.memory.quantity import GIB
from internvl_api.models.catalogue import CatalogueModel, count_context_tokens, count_patches, find_model
from internvl_api.run_config import RunConfig

# An AdamW state of three fp32 numbers a trained parameter: master weight, first and second moment. DeepSpeed keeps a
# master copy of its partition also when the weights themselves are fp32.
_OPTIMIZER_BYTES = 12
# CUDA context, cuBLAS workspaces and NCCL's channels.
_CONTEXT_BYTES = GIB
# What the caching allocator keeps over what is asked of it, because rows differ in length from step to step.
_FRAGMENTATION = 0.1
# NF4 with quantized scales: 4 bits and 0.127 more (QLoRA, Dettmers et al. 2023, section 3).
_NF4_BYTES = 4.127 / 8
_TEXT_TOKENS = 512  # of a typical row: a question and its answer
_ANSWER_TOKENS = 256


class Row(NamedTuple):
    """One row of a micro batch: tokens in all, tiles among them, and positions that the loss is taken on."""

    tokens: int
    tiles: int
    supervised: int


@dataclass(frozen=True)
class ZeroSettings:
    """What of DeepSpeed's configuration costs memory; sizes in elements. Defaults are the trainer's.

    `fitted`: a bucket is no larger than all gradients together, which the trainer sees to when the model is there.
    """

    reduce_bucket: int = 1_000_000_000
    fitted: bool = True
    overlap: bool = True
    contiguous_gradients: bool = True
    max_live: int = 1_000_000_000
    persistence_threshold: int = 10_000_000
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True)
class Setup:
    """What the estimate depends on. `learns_*` is about a part's own weights, not about an adapter on it."""

    model: CatalogueModel
    world_size: int
    zero_stage: int
    global_batch: int
    micro_batch: int
    max_seq_length: int
    max_tiles: int  # of one picture, the thumbnail counted
    tile_size: int
    element_bytes: int  # 2 for bf16, 4 for fp32
    gradient_checkpointing: bool
    language_rank: int  # of an adapter; 0: none
    vision_rank: int
    learns_language: bool
    learns_vision: bool
    learns_projector: bool
    pack: tuple[int, int] | None = None  # tokens and tiles of a full pack, when rows are packed
    zero: ZeroSettings = field(default_factory=ZeroSettings)
    quantized: bool = False  # the language model's layers in 4 bits

    @property
    def adapter_parameters(self) -> int:
        """Of both towers' adapters."""
        language = self.model.language.lora_parameters(self.language_rank)
        return language + self.model.vision.lora_parameters(self.vision_rank)

    @property
    def trainable_parameters(self) -> int:
        """Parameters with a gradient and an optimizer state."""
        model = self.model
        return (
            self.adapter_parameters
            + model.language.parameters * self.learns_language
            + model.vision.parameters * self.learns_vision
            + model.projector_parameters * self.learns_projector
        )

    @property
    def context_tokens(self) -> int:
        """Of one tile."""
        return count_context_tokens(self.tile_size)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by what they are for.

    Attributes:
        activations: what the backward pass needs of both towers, with one layer's recomputation.
        logits: what the loss needs beyond that; its moment comes before the recomputation of layers.
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
        """Name to bytes, in the order of the attributes."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


Verdict = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class Estimate:
    """Both kinds of rows against one GPU's memory (bytes)."""

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
    """The estimate of a run on GPUs of `gpu_memory` bytes; None when the model is not in the catalogue."""
    setup = setup_of(config)
    return judge(setup, gpu_memory) if setup else None


def judge(setup: Setup, gpu_memory: int) -> Estimate:
    """`estimate` for a setup that was made or changed by hand."""
    typical, longest = memory(setup, typical_row(setup)), memory(setup, longest_row(setup))
    return Estimate(setup, gpu_memory, typical, max(typical, longest, key=lambda each: each.total))


def setup_of(config: RunConfig) -> Setup | None:
    """What matters of a RunConfig; None when its model is not in the catalogue."""
    model = find_model(config.model.name) if config.model.name else None
    if model is None:
        return None
    training, freeze = config.training, config.training.freeze
    lora = config.method == "lora"
    language_rank = config.lora.language_rank if lora else 0
    vision_rank = config.lora.vision_rank if lora else 0
    return Setup(
        model=model,
        world_size=config.world_size,
        zero_stage=training.zero_stage,
        global_batch=training.global_batch_size,
        micro_batch=training.micro_batch_size,
        max_seq_length=training.max_seq_length,
        max_tiles=_max_tiles(config),
        tile_size=config.image.tile_size or model.tile_size,
        element_bytes=2 if config.precision == "bf16" else 4,
        gradient_checkpointing=training.gradient_checkpointing,
        language_rank=language_rank,
        vision_rank=vision_rank,
        learns_language=not freeze.language and not language_rank,
        learns_vision=not freeze.vision and not vision_rank,
        learns_projector=not freeze.projector,
        pack=(training.packing.max_tokens, training.packing.max_tiles) if training.packing.enabled else None,
        zero=_zero_settings(training.deepspeed.get("zero_optimization", {})),
        quantized=lora and config.lora.quantize is not None,
    )


def _max_tiles(config: RunConfig) -> int:
    image = config.image
    if not image.dynamic:
        return 1
    own = [dataset.max_dynamic_patch for dataset in config.data.train.values() if dataset.max_dynamic_patch]
    tiles = max([image.max_dynamic_patch, *own])
    return tiles + 1 if image.thumbnail and tiles > 1 else tiles


def _zero_settings(overrides: Mapping[str, Any]) -> ZeroSettings:
    """The user's overrides over the trainer's configuration; `auto` and other words keep the default."""
    usual = ZeroSettings()

    def size(key: str, default: int) -> int:
        value = overrides.get(key)
        return int(value) if isinstance(value, int | float) else default

    def offloads(key: str) -> bool:
        value = overrides.get(key)
        return isinstance(value, Mapping) and value.get("device", "none") != "none"

    return ZeroSettings(
        reduce_bucket=size("reduce_bucket_size", usual.reduce_bucket),
        overlap=bool(overrides.get("overlap_comm", usual.overlap)),
        contiguous_gradients=bool(overrides.get("contiguous_gradients", usual.contiguous_gradients)),
        max_live=size("stage3_max_live_parameters", usual.max_live),
        persistence_threshold=size("stage3_param_persistence_threshold", usual.persistence_threshold),
        offload_optimizer=offloads("offload_optimizer"),
        offload_parameters=offloads("offload_param"),
    )


def typical_row(setup: Setup) -> Row:
    """One picture with as many tiles as allowed, a question, and an answer that is learnt; or a pack of such rows."""
    if setup.pack is not None:
        one = typical_row(replace(setup, pack=None))
        rows = setup.pack[0] // one.tokens
        return Row(setup.pack[0], min(setup.pack[1], rows * one.tiles), rows * one.supervised)
    tiles = min(setup.max_tiles, setup.max_seq_length // setup.context_tokens)
    text = min(_TEXT_TOKENS, setup.max_seq_length - tiles * setup.context_tokens)
    return Row(tiles * setup.context_tokens + text, tiles, min(_ANSWER_TOKENS, text))


def longest_row(setup: Setup) -> Row:
    """One picture, and text up to maxSeqLength that is all learnt; or a pack full of tiles, its text all learnt."""
    if setup.pack is not None:
        tokens = setup.pack[0]
        tiles = min(setup.pack[1], tokens // setup.context_tokens)
        return Row(tokens, tiles, tokens - tiles * setup.context_tokens)
    tiles = typical_row(setup).tiles
    return Row(setup.max_seq_length, tiles, setup.max_seq_length - tiles * setup.context_tokens)


def memory(setup: Setup, row: Row) -> Memory:
    """Bytes on one GPU when every row of a micro batch is like `row`."""
    activations, logits = _activations(setup, row)
    buffers = _buffers(setup)
    # The optimizer's step comes when activations and buffers are gone; only what it needs beyond them counts.
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
    """Parameters of one rank: ZeRO shards optimizer state from stage 1, gradients from 2, weights from 3."""
    return -(-parameters // setup.world_size) if setup.zero_stage >= from_stage else parameters


def _weights(setup: Setup) -> int:
    """Under ZeRO-3 matrices up to the persistence threshold, and all vectors, stay whole on every rank."""
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
    """The step's flat copy of the partition's gradients, and the same in fp32 (DeepSpeed, stage_1_and_2.py, `step`).

    Under ZeRO-3 it is made for one sub-group at a time, of 1e9 elements at most.
    """
    own = _sharded(setup.trainable_parameters, setup, from_stage=1)
    if setup.zero.offload_optimizer:
        return 0
    return 4 * min(own, 1_000_000_000) if setup.zero_stage == 3 else (4 + setup.element_bytes) * own


def _buffers(setup: Setup) -> int:
    """DeepSpeed's reduce buckets, which it makes at full size whatever is trained (`setup_buckets` of its optimizers).

    ZeRO-3 adds the gathered weights: up to stage3_max_live_parameters, or the largest matrix where that is more.
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
    """(activations, logits): the largest of three moments of a step.

    1. the loss: everything held, and the logits of supervised positions;
    2. the backward pass of a language layer: everything held, and that layer's own activations;
    3. the vision tower: its forward pass when it is frozen (nothing of it is held), else its backward pass.
    """
    model, size = setup.model, setup.element_bytes
    tokens, supervised = setup.micro_batch * row.tokens, setup.micro_batch * row.supervised
    tiles = setup.micro_batch * row.tiles
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
    loss = tokens * language.ends + supervised * (LOGIT_BYTES * model.language.vocab + size * model.language.hidden)
    activations = int(max(held + tokens * language.layer, held_vision + patches * vision.layer))
    return activations, max(0, int(held + loss) - activations)

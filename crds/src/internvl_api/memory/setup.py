"""What the memory estimate depends on: a run's setup, and the rows of its micro batches."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from internvl_api.models.catalogue import CatalogueModel, count_context_tokens, find_model
from internvl_api.models.retrieval import RETRIEVAL_CATALOGUE, RetrievalCatalogueModel
from internvl_api.run_config import RunConfig
from internvl_api.spec.model import Freeze

_TEXT_TOKENS = 512  # of a typical row: a question and its answer
_ANSWER_TOKENS = 256
_TEXTS = 3  # of a retrieval model's pair: one for contrast, two for matching


class Row(NamedTuple):
    """One row of a micro batch: its tokens, its tiles, and its supervised tokens."""

    tokens: int
    tiles: int
    supervised: int


@dataclass(frozen=True)
class ZeroSettings:
    """The DeepSpeed settings that cost memory; sizes in elements. Defaults are the trainer's.

    `fitted`: a bucket is no larger than all gradients together; the trainer sets it so once the model is loaded.
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
    """Input of the estimate. `learns_*` is about a part's own weights, not about an adapter on it."""

    model: CatalogueModel
    world_size: int
    zero_stage: int
    global_batch: int
    micro_batch: int
    max_seq_length: int
    max_tiles: int  # of one image, with the thumbnail
    tile_size: int
    element_bytes: int  # 2 for bf16, 4 for fp32
    gradient_checkpointing: bool
    language_rank: int  # of an adapter; 0 without one
    vision_rank: int
    learns_language: bool
    learns_vision: bool
    learns_projector: bool
    max_tokens: int | None = None  # of a micro batch
    pack: tuple[int, int] | None = None  # tokens and tiles of a full pack, when rows are packed
    zero: ZeroSettings = field(default_factory=ZeroSettings)
    quantized: bool = False  # the language model's layers in 4 bits
    learns_head: bool = False  # of a retrieval model: the language head and the text projection
    whole_logits: bool = False  # the logits of all supervised positions at once, as in upstream's code

    @property
    def adapter_parameters(self) -> int:
        """Parameters of both towers' adapters."""
        language = self.model.language.lora_parameters(self.language_rank)
        return language + self.model.vision.lora_parameters(self.vision_rank)

    @property
    def trainable_parameters(self) -> int:
        """Parameters with a gradient and an optimizer state."""
        model = self.model
        head = model.head_parameters if self.learns_head and isinstance(model, RetrievalCatalogueModel) else 0
        return (
            self.adapter_parameters
            + head
            + model.language.parameters * self.learns_language
            + model.vision.parameters * self.learns_vision
            + model.projector_parameters * self.learns_projector
        )

    def rows(self, row: Row) -> float:
        """Rows of this size in a micro batch; a part of one where others share it."""
        if self.max_tokens is None:
            return self.micro_batch
        return max(1.0, min(self.micro_batch, self.max_tokens / row.tokens))

    @property
    def context_tokens(self) -> int:
        """Context tokens of one tile, at least one: run.yaml may have a tile that is too small for one."""
        return max(1, count_context_tokens(self.tile_size))


def setup_of(config: RunConfig) -> Setup | None:
    """The setup of a RunConfig; None when its model is not in the catalogue. With method none, nothing learns."""
    name = config.model.name or ""
    model = find_model(name) or RETRIEVAL_CATALOGUE.get(name)
    if model is None:
        return None
    retrieves = isinstance(model, RetrievalCatalogueModel)
    towers_frozen = retrieves and config.method != "full"
    training = config.training
    # The method alone decides what of a retrieval model trains.
    freeze = Freeze(vision=False, projector=False, language=False) if retrieves else training.freeze
    if not config.trains:
        freeze = Freeze(vision=True, projector=True, language=True)
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
        max_tiles=_max_tiles(config, model),
        tile_size=config.image.tile_size or model.tile_size,
        element_bytes=2 if config.precision == "bf16" else 4,
        gradient_checkpointing=training.gradient_checkpointing,
        language_rank=language_rank,
        vision_rank=vision_rank,
        learns_language=not (freeze.language or language_rank or towers_frozen),
        learns_vision=not (freeze.vision or vision_rank or towers_frozen),
        learns_projector=not (freeze.projector or towers_frozen),
        learns_head=towers_frozen and config.trains,
        max_tokens=training.max_tokens_per_micro_batch,
        pack=(training.packing.max_tokens, training.packing.max_tiles) if training.packing.enabled else None,
        zero=_zero_settings(training.deepspeed.get("zero_optimization", {})),
        quantized=lora and config.lora.quantize is not None,
    )


def setup_on_gpus(config: RunConfig) -> Setup | None:
    """The setup of a run on GPUs; None on the CPU too."""
    return setup_of(config) if config.device == "cuda" else None


def _max_tiles(config: RunConfig, model: CatalogueModel) -> int:
    """Maximum tiles of one image; the catalogue's value stands for what the run takes from its checkpoint."""
    tiling = config.image.tiling
    if not tiling.dynamic:
        return 1
    own = [dataset.max_dynamic_patch for dataset in config.data.train.values() if dataset.max_dynamic_patch]
    tiles = max([config.image.max_dynamic_patch or model.max_dynamic_patch, *own])
    return tiles + 1 if tiling.thumbnail and tiles > 1 else tiles


def _zero_settings(overrides: Mapping[str, Any]) -> ZeroSettings:
    """The user's overrides of the trainer's configuration; `auto` and other text keep the default."""
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
    """A row with one image of as many tiles as allowed, a question and a supervised answer; or a pack of such rows."""
    if isinstance(setup.model, RetrievalCatalogueModel):
        return _pair(setup, setup.model)
    if setup.pack is not None:
        one = typical_row(replace(setup, pack=None))
        rows = setup.pack[0] // one.tokens
        return Row(setup.pack[0], min(setup.pack[1], rows * one.tiles), rows * one.supervised)
    tiles = min(setup.max_tiles, setup.max_seq_length // setup.context_tokens)
    text = min(_TEXT_TOKENS, setup.max_seq_length - tiles * setup.context_tokens)
    return Row(tiles * setup.context_tokens + text, tiles, min(_ANSWER_TOKENS, text))


def longest_row(setup: Setup) -> Row:
    """A row with one image and supervised text up to maxSeqLength; or a pack full of tiles, with supervised text."""
    if isinstance(setup.model, RetrievalCatalogueModel):
        return _pair(setup, setup.model)
    if setup.pack is not None:
        tokens = setup.pack[0]
        tiles = min(setup.pack[1], tokens // setup.context_tokens)
        return Row(tokens, tiles, tokens - tiles * setup.context_tokens)
    tiles = typical_row(setup).tiles
    return Row(setup.max_seq_length, tiles, setup.max_seq_length - tiles * setup.context_tokens)


def _pair(setup: Setup, model: RetrievalCatalogueModel) -> Row:
    """An image with its captions: QLLaMA reads three texts, each behind the learned queries, and has no logits."""
    return Row(_TEXTS * (model.slots + setup.max_seq_length), 1, 0)

"""What must be there before the first step: base model, method, engine, data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.sources import fetch_directory, open_media
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.data.loader import Collation, Loader, PackDataset, RowDataset
from internvl_trainer.data.open_datasets import (
    OpenDataset,
    open_datasets,
    open_validation,
    sample_settings,
)
from internvl_trainer.data.packing import PackedOrder, PackLimits
from internvl_trainer.data.preflight_results import read_bad_lines, read_row_sizes
from internvl_trainer.data.sampler import GlobalOrder, Order
from internvl_trainer.distributed import Group
from internvl_trainer.errors import UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.model.adapters import Freeze, apply_method
from internvl_trainer.model.base_identity import describe_base
from internvl_trainer.model.load import LoadedModel, load_chat_model
from internvl_trainer.model.quantize import check_quantization, quantize_language_model
from internvl_trainer.retrieval.training import retrieval_parts
from internvl_trainer.train.engine import build_engine, parameter_groups
from internvl_trainer.train.export import export_adapter, export_model
from internvl_trainer.train.parts import Export, Parts, lora_settings, partitioning, weights_dtype
from internvl_trainer.train.validation import Validation

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything the loop works with."""

    config: RunConfig
    group: Group
    parts: Parts
    engine: Any
    total_steps: int
    base_identity: dict[str, Any]

    @property
    def order(self) -> Order[Any]:
        """Which rows a step learns from."""
        return self.parts.order

    def loader(self, first_step: int) -> Loader:
        """Batches of this rank from `first_step` on."""
        training, group = self.config.training, self.group
        return Loader(
            self.parts.dataset,
            self.order.micro_batches(
                first_step,
                self.total_steps,
                rank=group.rank,
                world_size=group.world_size,
                micro_batch=training.micro_batch_size,
            ),
            collation=self.parts.collation,
            workers=training.data_workers,
            accumulation=training.global_batch_size // (group.world_size * training.micro_batch_size),
            pin_memory=group.device.type == "cuda",
        )


def prepare(config: RunConfig, group: Group, storage: Storage, reporter: Reporter) -> Run:
    """Fetch, load and build. Raises UserError for what the user must mend."""
    training = config.training
    check_batch(config, group.world_size)
    if config.lora.quantize is not None:
        check_quantization(group.device)
    reporter.doing("fetching the model")
    base = fetch_directory(config.model.source, field="spec.model.source")
    reporter.doing("noting which model it is")
    base_identity = group.first(describe_base(config) if group.leads else None)
    make_parts = retrieval_parts if config.model.kind == "retrieval" else chat_parts
    parts = make_parts(config, base, group, storage, reporter)
    reporter.doing("starting DeepSpeed")
    return Run(
        config=config,
        group=group,
        parts=parts,
        engine=build_engine(config, parts.model, parts.groups, group),
        total_steps=parts.order.count_steps(training.epochs, training.max_steps),
        base_identity=base_identity,
    )


def chat_parts(config: RunConfig, base: Path, group: Group, storage: Storage, reporter: Reporter) -> Parts:
    """Load the chat model, put adapters in, index the conversations."""
    training = config.training
    reporter.doing("loading the model")
    loaded = load_model(config, base, group)
    if config.lora.quantize is not None:
        quantize_language_model(loaded.model, group.device)
    report = apply_method(
        loaded.model, config.method, freeze=freeze(config), lora=lora_settings(config), seed=training.seed
    )
    loaded.model.set_gradient_checkpointing(training.gradient_checkpointing)
    if group.leads:
        logger.info("%s", report)
    reporter.doing("indexing the data")
    rows = open_rows(config, loaded, storage, reporter)
    order = make_order(config, rows, storage, image_tokens=config.image.max_dynamic_patch * loaded.context_tokens)
    return Parts(
        model=loaded.model,
        groups=parameter_groups(loaded.model, training.weight_decay, decay_all=config.data.compat == "upstream"),
        dataset=PackDataset(rows, training.packing.max_tokens) if training.packing.enabled else rows,
        order=order,
        collation=Collation(
            pad_token_id=loaded.tokenizer.pad_token_id or 0,
            weighting=training.loss_weighting,
            flat=loaded.attn_implementation == "flash_attention_2",
        ),
        validation=open_held_out(config, loaded, storage, group),
        export=_export(config, base, loaded, group),
    )


def _export(config: RunConfig, base: Path, loaded: LoadedModel, group: Group) -> Export:
    if config.method == "lora":
        return lambda engine, directory: export_adapter(engine, loaded.model, directory, group)
    return lambda engine, directory: export_model(engine, loaded, base, directory, config, group)


def make_order(config: RunConfig, dataset: RowDataset, storage: Storage, *, image_tokens: int) -> Order[Any]:
    """The order of rows or packs: a function of the configuration and of the sizes that preflight stored.

    Args:
        image_tokens: of a row with a picture, to estimate lengths for grouping by where preflight has not run.
    """
    training, packing = config.training, config.training.packing
    needed = packing.enabled or training.group_by_length
    counted = read_row_sizes(config, storage) if needed else None
    if not packing.enabled:
        lengths = None
        if training.group_by_length:
            lengths = dataset.sizes(counted)[:, 0] if counted else dataset.estimate_lengths(image_tokens)
        return GlobalOrder(len(dataset), training.global_batch_size, training.seed, lengths)
    if counted is None:
        raise UserError(
            "PreflightMissing",
            "packing needs the sizes of rows that the preflight stage counts; run it first",
            "spec.training.packing",
        )
    limits = PackLimits(packing.max_tokens, packing.max_tiles, packing.buffer_size)
    return PackedOrder(dataset.sizes(counted), limits, training.global_batch_size, training.seed)


def check_batch(config: RunConfig, world_size: int) -> None:
    """The global batch must be whole micro-batches on every rank, for the world that is really here."""
    training = config.training
    per_forward = world_size * training.micro_batch_size
    if training.global_batch_size % per_forward:
        raise UserError(
            "BatchNotDivisible",
            f"found {training.global_batch_size}, which {world_size} processes x microBatchSize "
            f"{training.micro_batch_size} = {per_forward} does not divide; change one of them",
            "spec.training.globalBatchSize",
        )


def load_model(config: RunConfig, base: Path, group: Group) -> LoadedModel:
    """The base model in training's precision, partitioned from the start under ZeRO-3."""
    return load_chat_model(
        base,
        dtype=weights_dtype(config),
        image_size=config.image.tile_size,
        drop_path_rate=config.model.drop_path_rate,
        zero3_config=partitioning(config, group),
    )


def freeze(config: RunConfig) -> Freeze:
    """The spec's freeze flags."""
    chosen = config.training.freeze
    return Freeze(vision=chosen.vision, projector=chosen.projector, language=chosen.language)


def open_rows(config: RunConfig, loaded: LoadedModel, storage: Storage, reporter: Reporter) -> RowDataset:
    """The rows of an epoch, without those that preflight found bad."""
    bad_lines = read_bad_lines(config, storage)
    reporter.skipped_rows.set(sum(len(lines) for lines in bad_lines.values()))
    return _rows(open_datasets(config), config, loaded, bad_lines, seed=config.training.seed)


def open_held_out(config: RunConfig, loaded: LoadedModel, storage: Storage, group: Group) -> Validation | None:
    """What takes the loss on data.validation; None where the spec names no such rows."""
    if not config.data.validation:
        return None
    rows = _rows(open_validation(config), config, loaded, read_bad_lines(config, storage), seed=None)
    if len(rows) == 0:
        raise UserError("NoRowsLeft", "no row is left to validate on", "spec.data.validation")
    return Validation(
        rows,
        group,
        collation=Collation(loaded.tokenizer.pad_token_id or 0),
        micro_batch=config.training.micro_batch_size,
        workers=config.training.data_workers,
    )


def _rows(
    datasets: Sequence[OpenDataset],
    config: RunConfig,
    loaded: LoadedModel,
    bad_lines: Mapping[str, Sequence[int]],
    *,
    seed: int | None,
) -> RowDataset:
    return RowDataset(
        datasets,
        sample_settings(
            config,
            template=loaded.template,
            image_size=loaded.image_size,
            context_tokens=loaded.context_tokens,
        ),
        loaded.tokenizer,
        open_media,
        seed=seed,
        bad_lines=bad_lines,
    )

"""What a chat model brings to training: conversations, adapters, and the export in the base model's format."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from internvl_api.constants import INDEXING, LOADING_MODEL
from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.data.loader import Collation, PackDataset, RowDataset
from internvl_trainer.data.open_datasets import (
    VALIDATION,
    OpenDataset,
    open_datasets,
    open_validation,
    sample_settings,
)
from internvl_trainer.data.packing import PackedOrder, PackLimits
from internvl_trainer.data.preflight_results import read_bad_lines, read_row_sizes
from internvl_trainer.data.sample import SampleSettings
from internvl_trainer.data.sampler import GlobalOrder, Order, TokenBudget
from internvl_trainer.distributed import Group
from internvl_trainer.errors import UserError
from internvl_trainer.model.adapter_base import identify_base
from internvl_trainer.model.adapters import apply_method
from internvl_trainer.model.load import LoadedModel, load_chat_model
from internvl_trainer.model.quantize import quantize_filled
from internvl_trainer.run_context import GroupContext, RunContext
from internvl_trainer.train.base_model import BaseModel
from internvl_trainer.train.components import Components, Export, freeze, lora_settings, partitioning, weights_dtype
from internvl_trainer.train.engine import parameter_groups
from internvl_trainer.train.export import export_adapter, export_model
from internvl_trainer.train.sample_answers import SampleAnswers
from internvl_trainer.train.validation import Validation

logger = logging.getLogger(__name__)


def chat_components(context: GroupContext, base: BaseModel) -> Components:
    """Load the chat model, add its adapters, and index the conversations."""
    config, group, reporter = context.config, context.group, context.reporter
    training = config.training
    reporter.doing(LOADING_MODEL)
    loaded = load_model(config, base, group)
    report = apply_method(
        loaded.model, config.method, freeze=freeze(config), lora=lora_settings(config), seed=training.seed
    )
    loaded.model.set_gradient_checkpointing(training.gradient_checkpointing)
    if group.leads:
        logger.info("%s", report)
    reporter.doing(INDEXING)
    rows = open_rows(context, loaded)
    order = make_order(
        config, rows, context.storage, image_tokens=config.image.tiling.max_tiles * loaded.context_tokens
    )
    return Components(
        model=loaded.model,
        groups=parameter_groups(loaded.model, training.weight_decay, decay_all=config.data.compat == "upstream"),
        dataset=PackDataset(rows, training.packing.max_tokens) if training.packing.enabled else rows,
        order=order,
        collation=Collation(
            image_token_id=loaded.model.native.config.image_token_id,
            weighting=training.loss_weighting,
            sources=len(rows.names) > 1,
        ),
        validation=open_held_out(context, loaded),
        export=_export(config, base, loaded, group),
        datasets=rows.names,
        samples=open_samples(context, loaded),
    )


def _export(config: RunConfig, base: BaseModel, loaded: LoadedModel, group: Group) -> Export:
    source = base.open()
    if config.method == "lora":
        recorded = identify_base(source, config.model.source) if group.leads else None
        return lambda engine, directory: export_adapter(engine, loaded.model, directory, group, recorded)
    return lambda engine, directory: export_model(engine, loaded, source, directory, config, group)


def make_order(config: RunConfig, dataset: RowDataset, storage: Storage, *, image_tokens: int) -> Order[Any]:
    """The order of rows or packs, decided by the configuration and the sizes that preflight stored.

    Args:
        image_tokens: tokens of a picture, for estimated lengths where preflight has not run.
    """
    training, packing = config.training, config.training.packing
    mixed = dataset.mixed(config.data.mixing_temperature, training.seed)
    limit = training.max_tokens_per_micro_batch
    needed = packing.enabled or training.group_by_length or limit is not None
    counted = read_row_sizes(config, storage) if needed else None
    if counted is None and (packing.enabled or limit is not None):
        what = "packing" if packing.enabled else "maxTokensPerMicroBatch"
        raise UserError(
            "PreflightMissing",
            f"{what} needs the tokens of every row, which the preflight stage counts; run it first, without "
            "data.preflight.sample",
            f"spec.training.{what}",
        )
    if counted is None or not packing.enabled:
        lengths, budget = None, None
        if training.group_by_length:
            lengths = dataset.sizes(counted)[:, 0] if counted else dataset.estimate_lengths(image_tokens)
        if counted is not None and limit is not None:
            budget = TokenBudget(limit, dataset.sizes(counted)[:, 0])
        return GlobalOrder(len(dataset), training.global_batch_size, training.seed, lengths, mixed, budget)
    limits = PackLimits(packing.max_tokens, packing.max_tiles, packing.buffer_size)
    return PackedOrder(dataset.sizes(counted), limits, training.global_batch_size, training.seed, mixed)


def load_model(config: RunConfig, base: BaseModel, group: Group) -> LoadedModel:
    """The base model in training's precision on this rank's device, partitioned from the start under ZeRO-3.

    Layers for QLoRA are quantized as they come.
    """
    quantizes = config.lora.quantize is not None
    return load_chat_model(
        base.directory,
        dtype=weights_dtype(config),
        device=group.device,
        image_size=config.image.tile_size,
        drop_path_rate=config.model.drop_path_rate,
        resize_embeddings=config.model.resize_embeddings,
        zero3_config=partitioning(config, group),
        entries=base.entries,
        is_skipped=base.is_restored,
        prepare=(lambda model, name: quantize_filled(model, name, group.device)) if quantizes else None,
    )


def open_rows(context: RunContext, loaded: LoadedModel) -> RowDataset:
    """The rows of an epoch, without those that preflight found bad."""
    config = context.config
    bad_lines = read_bad_lines(config, context.storage)
    context.reporter.skipped_rows.set(sum(len(lines) for lines in bad_lines.values()))
    return _rows(open_datasets(config), config, loaded, bad_lines, seed=config.training.seed)


def open_held_out(context: GroupContext, loaded: LoadedModel) -> Validation | None:
    """Takes the loss on data.validation; None where the spec names no such rows."""
    config = context.config
    if not config.data.has_validation:
        return None
    rows = _held_out_rows(context, loaded)
    return Validation(
        rows,
        context.group,
        collation=Collation(loaded.model.native.config.image_token_id, sources=len(rows.names) > 1),
        datasets=[name.removeprefix(VALIDATION) for name in rows.names],
        micro_batch=config.training.micro_batch_size if config.training.max_tokens_per_micro_batch is None else 1,
        workers=config.training.data_workers,
    )


def open_samples(context: GroupContext, loaded: LoadedModel) -> SampleAnswers | None:
    """Answers a few rows of data.validation during training; None where the spec does not ask for it."""
    training = context.config.training
    if training.samples is None:
        return None
    return SampleAnswers(
        _held_out_rows(context, loaded),
        loaded,
        _settings(context.config, loaded),
        training.samples,
        context.group,
        seed=training.seed,
    )


def _held_out_rows(context: GroupContext, loaded: LoadedModel) -> RowDataset:
    config = context.config
    rows = _rows(open_validation(config), config, loaded, read_bad_lines(config, context.storage), seed=None)
    if len(rows) == 0:
        raise UserError("NoRowsLeft", "no row is left to validate on", "spec.data.validation")
    return rows


def _settings(config: RunConfig, loaded: LoadedModel) -> SampleSettings:
    return sample_settings(
        config, template=loaded.template, image_size=loaded.image_size, context_tokens=loaded.context_tokens
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
        _settings(config, loaded),
        loaded.tokenizer,
        open_media,
        seed=seed,
        bad_lines=bad_lines,
        sample=config.data.preflight.sample,
    )

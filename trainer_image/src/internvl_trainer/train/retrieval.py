"""A retrieval model's part in training: pairs in, contrast and matching, a rate for each layer."""

from __future__ import annotations

import logging

from internvl_api.constants import LOADING_MODEL, READING_PAIRS
from internvl_api.run_config import RunConfig
from transformers import PreTrainedTokenizerBase

from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.open_datasets import picture_decoding
from internvl_trainer.data.preflight_results import read_bad_lines
from internvl_trainer.data.sampler import GlobalOrder
from internvl_trainer.distributed import Group
from internvl_trainer.errors import UserError
from internvl_trainer.model.adapter_base import identify_base
from internvl_trainer.model.tokenizer import read_tokenizer
from internvl_trainer.retrieval.layer_decay import LayerDecay, describe_groups, layer_groups
from internvl_trainer.retrieval.load import LoadedRetrievalModel, load_retrieval_model
from internvl_trainer.retrieval.methods import apply_retrieval_method
from internvl_trainer.retrieval.pair_dataset import (
    OpenPairs,
    PairDataset,
    collate_micro_batch,
    open_pairs,
    open_validation_pairs,
    refuse_bad_lines,
)
from internvl_trainer.run_context import GroupContext
from internvl_trainer.train.base_model import BaseModel
from internvl_trainer.train.components import Components, Export, lora_settings, partitioning, weights_dtype
from internvl_trainer.train.export import export_adapter, export_retrieval_model
from internvl_trainer.train.validation import Validation

logger = logging.getLogger(__name__)

_LISTED = 20  # parameters that are named in the log one by one


def retrieval_components(context: GroupContext, base: BaseModel) -> Components:
    """Load the model, choose what learns, read the pairs. Raises UserError for what the user must correct."""
    config, group, reporter = context.config, context.group, context.reporter
    training = config.training
    reporter.doing(LOADING_MODEL)
    loaded = load_retrieval_model(
        base.directory,
        dtype=weights_dtype(config),
        device=group.device,
        image_size=config.image.tile_size,
        drop_path_rate=config.model.drop_path_rate,
        hard_negatives=config.retrieval.hard_negatives,
        zero3_config=partitioning(config, group),
        entries=base.entries,
        is_skipped=base.is_restored,
    )
    lora = {} if (settings := lora_settings(config)) is None else {"lora": settings}
    report = apply_retrieval_method(loaded.model, config.method, **lora, seed=training.seed)
    loaded.model.set_gradient_checkpointing(training.gradient_checkpointing)
    decay = LayerDecay(config.retrieval.layer_decay, config.retrieval.layer_decay)
    groups = layer_groups(loaded.model, training.weight_decay, decay)
    if group.leads:
        logger.info("%s", report)
        _log_learning(loaded)
        logger.info("learning rates after the warm-up:\n%s", describe_groups(groups, training.learning_rate))
    reporter.doing(READING_PAIRS)
    tokenizer = read_tokenizer(base.directory)
    bad_lines = read_bad_lines(config, context.storage)
    reporter.skipped_rows.set(sum(len(lines) for lines in bad_lines.values()))
    rows = _rows(config, open_pairs(config), loaded, tokenizer, bad_lines, "spec.data.train", training.seed)
    return Components(
        model=loaded.model,
        groups=groups,
        dataset=rows,
        order=GlobalOrder(len(rows), training.global_batch_size, training.seed),
        collation=collate_micro_batch,
        validation=_validation(config, loaded, tokenizer, bad_lines, group),
        export=_export(config, base, loaded, group),
    )


def _log_learning(loaded: LoadedRetrievalModel) -> None:
    """Name what learns where it is so little that a list can be read: a head's few parameters."""
    names = [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    if len(names) <= _LISTED:
        logger.info("these parameters learn: %s", ", ".join(names))


def _rows(
    config: RunConfig,
    datasets: list[OpenPairs],
    loaded: LoadedRetrievalModel,
    tokenizer: PreTrainedTokenizerBase,
    bad_lines: dict[str, list[int]],
    field: str,
    seed: int | None,
) -> PairDataset:
    """Raises UserError for a line that preflight did not list, or where there is nothing to tell pictures from."""
    for dataset in datasets:
        refuse_bad_lines(dataset, bad_lines.get(dataset.description.name, ()))
    rows = PairDataset(
        datasets,
        tokenizer,
        open_media,
        image_size=loaded.image_size,
        max_tokens=config.training.max_seq_length,
        seed=seed,
        bad_lines=bad_lines,
        decoding=picture_decoding(config),
        sample=config.data.preflight.sample,
    )
    if rows.images < 2:
        message = f"found captions of {rows.images} pictures; matching needs those of another, so give at least two"
        raise UserError("NoRowsLeft", message, field)
    return rows


def _validation(
    config: RunConfig,
    loaded: LoadedRetrievalModel,
    tokenizer: PreTrainedTokenizerBase,
    bad_lines: dict[str, list[int]],
    group: Group,
) -> Validation | None:
    if not config.data.validation:
        return None
    rows = _rows(config, open_validation_pairs(config), loaded, tokenizer, bad_lines, "spec.data.validation", None)
    return Validation(
        rows,
        group,
        collation=collate_micro_batch,
        micro_batch=config.training.micro_batch_size,
        workers=config.training.data_workers,
    )


def _export(config: RunConfig, base: BaseModel, loaded: LoadedRetrievalModel, group: Group) -> Export:
    source = base.open()
    if config.method == "lora":
        recorded = identify_base(source, config.model.source) if group.leads else None
        return lambda engine, directory: export_adapter(engine, loaded.model, directory, group, recorded)
    return lambda engine, directory: export_retrieval_model(engine, loaded, source, directory, group)

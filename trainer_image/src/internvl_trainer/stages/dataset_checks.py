"""Preflight's check of one dataset: its file, and all of its rows or a sample of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.diagnostics import Finding, count_repeated, with_counts
from internvl_trainer.data.open_datasets import OpenDataset, picture_decoding
from internvl_trainer.data.row_checks import ChatRows, Checker, check_length
from internvl_trainer.data.row_choice import choose_rows
from internvl_trainer.data.sample import SampleSettings
from internvl_trainer.distributed import usable_cpus
from internvl_trainer.retrieval.pair_checks import Pairs
from internvl_trainer.retrieval.pair_dataset import OpenPairs
from internvl_trainer.run_context import RunContext
from internvl_trainer.stages.preflight_cache import open_shard_store
from internvl_trainer.stages.row_parts import Part, check_part
from internvl_trainer.stages.row_shards import Rows, check_in_shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THREADS = 4  # of a process: some read pictures while one computes


@dataclass(frozen=True)
class CheckedRows:
    """What preflight knows of a dataset.

    Attributes:
        checked: number of rows that were checked.
        sizes: (rows, 2) int32 tokens and tiles of each row that an epoch uses, 0 for a bad row; None for a sample.
    """

    findings: list[Finding]
    checked: int
    sizes: np.ndarray | None


def count_used(dataset: OpenDataset | OpenPairs) -> int:
    """How many of the file's rows an epoch uses: all, or only the first ones."""
    return min(len(dataset.index), dataset.description.count_rows(len(dataset.index)))


def check_chat(
    context: RunContext,
    digest: str,
    settings: SampleSettings,
    tokenizer: PreTrainedTokenizerBase,
    dataset: OpenDataset,
) -> CheckedRows:
    """Check a chat dataset: its file, and the chosen rows. `digest` is that of the tokenizer's files."""
    description = dataset.description
    checker = Checker(description, settings, dataset.media_opener(open_media), tokenizer)
    return _check(context, digest, dataset, ChatRows(dataset.index, checker, _THREADS), [], asdict(settings))


def check_pairs(
    context: RunContext, digest: str, tokenizer: PreTrainedTokenizerBase, dataset: OpenPairs
) -> CheckedRows:
    """Check a retrieval dataset: every line of its caption file, and the chosen pairs; `digest` as for `check_chat`."""
    config = context.config
    pairs = Pairs(
        dataset.description,
        dataset.index,
        open_media,
        tokenizer,
        max_tokens=config.training.max_seq_length,
        threads=max(_THREADS, usable_cpus()),  # most caption files are one shard, so one process checks them
        decoding=picture_decoding(config),
    )
    settings = {"max_length": pairs.max_tokens, "decoding": asdict(pairs.decoding)}
    return _check(context, digest, dataset, pairs, dataset.findings, settings)


def _check(
    context: RunContext,
    digest: str,
    dataset: OpenDataset | OpenPairs,
    rows: Rows,
    of_file: Sequence[Finding],
    settings: Mapping[str, Any],
) -> CheckedRows:
    """The chosen rows' findings beside those of the file, in the file's order; none in a pod that only helps."""
    config, description = context.config, dataset.description
    used = count_used(dataset)
    chosen = choose_rows(used, config.data.preflight.sample, config.training.seed)

    def tell(done: int) -> None:
        context.reporter.doing(f"checking rows of {description.name}: {done} of {len(chosen)}")

    store = open_shard_store(context, dataset, settings, chosen, tokenizer=digest)
    part = Part.of_this_pod()
    if part.pods > 1:
        check_part(rows, chosen, store, part, processes=usable_cpus(), is_over=lambda: _is_over(context), tell=tell)
    if not part.leads:
        return CheckedRows([], len(chosen), None)
    sizes = np.zeros((len(chosen), 2), np.int32)
    counted = check_in_shards(rows, chosen, store, sizes, processes=usable_cpus(), tell=tell)
    whole = [(finding, 1) for finding in [*check_length(description, len(dataset.index)), *of_file]]
    found = sorted([*whole, *counted], key=lambda each: each[0].line or 0)
    every = len(chosen) == used
    return CheckedRows(with_counts(count_repeated(found)), len(chosen), sizes if every else None)


def _is_over(context: RunContext) -> bool:
    """Whether the first pod has finished the stage."""
    return context.stages.result("preflight") is not None


def describe_checked(config: RunConfig, checked: int, rows: int) -> str | None:
    """How many rows were checked, for a message; None when all were."""
    if checked == rows:
        return None
    return f"only {checked:,} of {rows:,} rows were checked (data.preflight.sample {config.data.preflight.sample:,})"

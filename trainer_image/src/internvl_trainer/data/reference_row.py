"""A row of the run's own data, short enough for a CPU, on which merged weights are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from internvl_api.run_config import RunConfig
from transformers import PreTrainedTokenizerBase

from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.data.collate import collate
from internvl_trainer.data.diagnostics import RowError, errors_of
from internvl_trainer.data.open_datasets import OpenDataset, open_datasets, sample_settings
from internvl_trainer.data.preflight_results import read_bad_lines
from internvl_trainer.data.sample import Sample, build_sample
from internvl_trainer.data.tokenize import IMAGE_CONTEXT
from internvl_trainer.errors import UserError
from internvl_trainer.model.checkpoint_format import Architecture

_MOST_TOKENS, _AFTER_IMAGES = 128, 64
_ROWS_TRIED = 1000


@dataclass(frozen=True)
class ReferenceRow:
    """A batch of one row, as `collate` makes it, and the row's file:line."""

    batch: dict[str, torch.Tensor]
    place: str


def reference_row(
    config: RunConfig, storage: Storage, architecture: Architecture, tokenizer: PreTrainedTokenizerBase
) -> ReferenceRow:
    """The first usable row of an epoch with one tile for each image, cut after 128 tokens or 64 after the last image.

    Raises:
        UserError: none of the first 1000 rows is usable, or the data are missing.
    """
    settings = sample_settings(
        config,
        template=architecture.template,
        image_size=architecture.image_size,
        context_tokens=architecture.context_tokens,
    )
    settings = replace(settings, min_tiles=1, max_tiles=1, thumbnail=False)
    problem = "there is none"
    for dataset, row in _rows(config, storage):
        description = replace(dataset.description, max_tiles=None)
        place = f"{description.annotation}:{dataset.index.line_number(row)}"
        content, findings = dataset.parse_row(row)
        if content is None:
            problem = str(errors_of(findings)[0])
            continue
        try:
            sample = build_sample(content, description, settings, tokenizer, dataset.media_opener(open_media))
        except RowError as error:
            problem = f"{place}: {error}"
            continue
        return ReferenceRow(_as_batch(sample, tokenizer), place)
    raise UserError(
        "NoRowsLeft", f"found no usable row to check the model on; the last one tried: {problem}", "spec.data"
    )


def _rows(config: RunConfig, storage: Storage) -> Iterator[tuple[OpenDataset, int]]:
    bad_lines = read_bad_lines(config, storage)
    tried = 0
    for dataset in open_datasets(config):
        for row in dataset.epoch_rows(bad_lines.get(dataset.description.name, ())):
            if tried == _ROWS_TRIED:
                return
            tried += 1
            yield dataset, int(row)


def _as_batch(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    context = sample.input_ids == tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
    images_end = int(context.nonzero()[0][-1]) + 1 if context.any() else 0
    kept = slice(max(_MOST_TOKENS, images_end + _AFTER_IMAGES))
    return collate([replace(sample, input_ids=sample.input_ids[kept], labels=sample.labels[kept])])

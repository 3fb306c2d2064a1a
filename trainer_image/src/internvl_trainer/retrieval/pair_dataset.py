"""The pairs of a run: its caption files, their samples by position, and batches with their counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from internvl_api.run_config import RunConfig
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from internvl_trainer.artifacts.sources import fetch_file
from internvl_trainer.artifacts.storage import patiently
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.diagnostics import Finding, RowError
from internvl_trainer.data.loader import PATIENCE_SECONDS, Failure, MicroBatch, unusable_row
from internvl_trainer.data.media import OpenMedia, open_picture
from internvl_trainer.data.open_datasets import describe_datasets, describe_validation
from internvl_trainer.data.pictures import DEFAULT, Decoding
from internvl_trainer.data.sampler import Position
from internvl_trainer.errors import UserError
from internvl_trainer.retrieval.caption_files import PairRow, read_captions
from internvl_trainer.retrieval.pair_batch import PairSample, build_pair_sample, choose_negative, collate_pairs


@dataclass(frozen=True)
class OpenPairs:
    """A dataset whose caption file has been read.

    Attributes:
        path: the caption file on this machine.
        index: the usable rows, in the file's order.
        findings: problems of the other rows and of the file.
    """

    description: DatasetDescription
    path: Path
    index: list[PairRow]
    findings: list[Finding]

    @property
    def shards(self) -> list[Path]:
        """Every file of the annotation on this machine."""
        return [self.path]

    @property
    def taken_for(self) -> str:
        """Kind of the rows, in words."""
        return f"{self.description.format} captions"

    def epoch_rows(self, bad_lines: Sequence[int] = ()) -> np.ndarray:
        """(n,) int32 positions in `index` of one epoch: repeatTime applied, bad lines left out."""
        if not self.index:
            return np.empty(0, np.int32)
        rows = self.description.source_rows(len(self.index))
        if not bad_lines:
            return rows
        lines = np.array([row.line for row in self.index])
        return rows[~np.isin(lines[rows], list(bad_lines))]


def open_pairs(config: RunConfig) -> list[OpenPairs]:
    """Fetch and read every caption file of data.train. Raises UserError naming the dataset's field or file."""
    return [
        _open(description, field, config.data.train[description.name].format)
        for description, field in describe_datasets(config)
    ]


def open_validation_pairs(config: RunConfig) -> list[OpenPairs]:
    """Fetch and read every caption file of data.validation. Raises UserError naming the dataset's field or file."""
    formats = [dataset.format for dataset in config.data.validation.values()]
    return [_open(*described, form) for described, form in zip(describe_validation(config), formats, strict=True)]


def _open(description: DatasetDescription, field: str, form: str) -> OpenPairs:
    path = fetch_file(description.annotation, field=f"{field}.annotation")
    read = read_captions(path, form, name=description.annotation)
    return OpenPairs(description, path, read.rows, read.findings)


def refuse_bad_lines(dataset: OpenPairs, bad_lines: Sequence[int]) -> None:
    """Raises UserError for an error on a line that preflight did not list for skipping."""
    for finding in dataset.findings:
        if finding.severity == "error" and finding.line not in bad_lines:
            raise UserError(finding.reason, f"{finding}; did the file change after preflight?")


class PairDataset(Dataset[PairSample | Failure]):
    """All pairs of one epoch, by position, so that every attempt draws the same crops and negatives.

    A file that two datasets name counts as one image. With `seed` None every epoch has the crops and negatives of the
    first.
    """

    def __init__(
        self,
        datasets: Sequence[OpenPairs],
        tokenizer: PreTrainedTokenizerBase,
        open_media: OpenMedia,
        *,
        image_size: int,
        max_tokens: int,
        seed: int | None,
        bad_lines: Mapping[str, Sequence[int]],
        decoding: Decoding = DEFAULT,
        sample: int | None = None,
    ) -> None:
        """`sample`: rows of each dataset that preflight checked; None: all."""
        self._sample = sample
        self._decoding = decoding
        self._datasets, self._tokenizer, self._open_media = datasets, tokenizer, open_media
        self._image_size, self._max_tokens, self._seed = image_size, max_tokens, seed
        rows = [dataset.epoch_rows(bad_lines.get(dataset.description.name, ())) for dataset in datasets]
        self._dataset = np.repeat(np.arange(len(datasets)), [len(each) for each in rows])
        self._row = np.concatenate(rows)
        self._image_ids = self._number_images()

    def __len__(self) -> int:
        return len(self._row)

    @property
    def images(self) -> int:
        """Number of different images."""
        return len(np.unique(self._image_ids))

    def __getitem__(self, position: Position) -> PairSample | Failure:
        epoch = 0 if self._seed is None else position.epoch
        rng = np.random.default_rng([self._seed or 0, epoch, position.row])
        description, row = self._find(position.row)
        _, negative = self._find(choose_negative(self._image_ids, position.row, rng))
        try:
            image = patiently(PATIENCE_SECONDS)(open_picture)(
                row.media, description.root, self._open_media, self._decoding
            )
        except RowError as error:
            return unusable_row(error.findings[0].at(row.file, row.line), self._sample)
        except UserError as error:
            return Failure(error.reason, error.message, error.where, type(error))
        sample = build_pair_sample(
            image, row, negative, self._tokenizer, rng, image_size=self._image_size, max_tokens=self._max_tokens
        )
        return replace(sample, image_id=int(self._image_ids[position.row]))

    def _find(self, row: int) -> tuple[DatasetDescription, PairRow]:
        dataset = self._datasets[int(self._dataset[row])]
        return dataset.description, dataset.index[int(self._row[row])]

    def _number_images(self) -> np.ndarray:
        numbers: dict[tuple[str, str], int] = {}
        found = (self._find(row) for row in range(len(self)))
        places = ((description.root, row.image) for description, row in found)
        return np.array([numbers.setdefault(place, len(numbers)) for place in places], np.int64)


def collate_micro_batch(draws: Sequence[PairSample | Failure]) -> MicroBatch | Failure:
    """The batch of pairs, each counted as one supervised token of weight 1, as the loss is a mean over pairs."""
    if failure := next((draw for draw in draws if isinstance(draw, Failure)), None):
        return failure
    pairs = [draw for draw in draws if isinstance(draw, PairSample)]
    tensors = collate_pairs(pairs)
    masks = [tensors[f"{kind}_attention_mask"] for kind in ("positive", "negative", "summarize")]
    return MicroBatch(
        tensors=tensors,
        rows=len(pairs),
        tokens=sum(int(mask.sum()) for mask in masks),
        places=sum(mask.numel() for mask in masks),
        supervised_tokens=len(pairs),
        weight=float(len(pairs)),
    )

"""Batches for the training loop: rows are read, tiled and tokenized in worker processes, ahead of the steps."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from internvl_trainer.data.collate import collate
from internvl_trainer.data.conversation import IGNORED
from internvl_trainer.data.dataset import OpenMedia, RowError, Sample, SampleSettings, build_sample
from internvl_trainer.data.datasets import OpenDataset, estimate_lengths
from internvl_trainer.data.sampler import Position
from internvl_trainer.errors import UserError
from internvl_trainer.signals import die_with_parent

_PREFETCHED = 4  # micro-batches that each worker may be ahead

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Failure:
    """An error of a worker as plain data, as exceptions do not travel well between processes."""

    reason: str
    message: str
    where: str | None


class RowDataset(Dataset[Sample | Failure]):
    """All rows of one epoch, over all datasets; drawn by position, so that every attempt augments alike."""

    def __init__(
        self,
        datasets: Sequence[OpenDataset],
        settings: SampleSettings,
        tokenizer: PreTrainedTokenizerBase,
        open_media: OpenMedia,
        *,
        seed: int,
        bad_lines: Mapping[str, Sequence[int]],
    ) -> None:
        self._datasets, self._settings, self._tokenizer = datasets, settings, tokenizer
        self._open_media, self._seed = open_media, seed
        self._rows = [dataset.epoch_rows(bad_lines.get(dataset.description.name, ())) for dataset in datasets]
        self._ends = np.cumsum([len(rows) for rows in self._rows])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: Position) -> Sample | Failure:
        dataset, row = self._find(position.row)
        description = dataset.description
        rng = np.random.default_rng([self._seed, position.epoch, position.row])
        try:
            content = json.loads(dataset.index[row])
            return build_sample(content, description, self._settings, self._tokenizer, self._open_media, rng)
        except RowError as error:
            finding = error.findings[0].at(description.annotation, dataset.index.line_number(row))
            return Failure(finding.reason, f"{finding}; did it change after preflight?", None)
        except UserError as error:
            return Failure(error.reason, error.message, error.where)

    def lengths(self, image_tokens: int) -> np.ndarray:
        """(rows,) rough lengths in tokens, to group rows by."""
        return np.concatenate(
            [
                estimate_lengths((dataset.index[int(row)] for row in rows), image_tokens)
                for dataset, rows in zip(self._datasets, self._rows, strict=True)
            ]
        )

    def _find(self, row: int) -> tuple[OpenDataset, int]:
        which = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[which - 1]) if which else 0
        return self._datasets[which], int(self._rows[which][row - first])


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step on one rank; counts are of this rank, `waited` is in seconds."""

    batches: list[Batch]
    supervised_tokens: int
    tokens: int
    waited: float


class Loader:
    """Windows of micro-batches, in the order the sampler gives."""

    def __init__(
        self,
        dataset: RowDataset,
        micro_batches: Iterable[list[Position]],
        *,
        pad_token_id: int,
        workers: int,
        accumulation: int,
        pin_memory: bool,
    ) -> None:
        self._accumulation = accumulation
        self._batches = iter(
            DataLoader(
                dataset,
                batch_sampler=micro_batches,
                num_workers=workers,
                collate_fn=partial(_collate, pad_token_id=pad_token_id),
                pin_memory=pin_memory,
                prefetch_factor=_PREFETCHED if workers else None,
                worker_init_fn=_own_signals,
            )
        )

    def window(self) -> Window:
        """The next optimizer step's micro-batches. Raises UserError for a row that cannot be read."""
        began = time.monotonic()
        batches = [self._next() for _ in range(self._accumulation)]
        return Window(
            batches=batches,
            supervised_tokens=sum(count_supervised(batch) for batch in batches),
            tokens=sum(int(batch["attention_mask"].sum()) for batch in batches),
            waited=time.monotonic() - began,
        )

    def _next(self) -> Batch:
        batch: Batch | Failure = next(self._batches)
        if isinstance(batch, Failure):
            raise UserError(batch.reason, batch.message, batch.where)
        return batch


def count_supervised(batch: Mapping[str, torch.Tensor]) -> int:
    """Positions whose next token is supervised."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _collate(rows: Sequence[Sample | Failure], pad_token_id: int) -> Batch | Failure:
    samples = [row for row in rows if isinstance(row, Sample)]
    return next((row for row in rows if isinstance(row, Failure)), None) or collate(samples, pad_token_id)


def _own_signals(_worker: int) -> Any:
    """A worker ends when the loop tells it to or dies, not by a Ctrl-C that is meant for the run."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

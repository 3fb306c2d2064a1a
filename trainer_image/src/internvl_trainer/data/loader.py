"""Batches for the training loop; worker processes read, tile and tokenize rows ahead of the steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from internvl_trainer.artifacts.storage import patiently
from internvl_trainer.data.collate import Weighting, collate, source_numbers
from internvl_trainer.data.diagnostics import Finding, RowError, errors_of
from internvl_trainer.data.media import OpenMedia
from internvl_trainer.data.mixing import MixedRows, mixed_rows
from internvl_trainer.data.open_datasets import OpenDataset, estimate_lengths
from internvl_trainer.data.packing import Pack
from internvl_trainer.data.preflight_results import RowSizes
from internvl_trainer.data.row_schema import ChatRow
from internvl_trainer.data.sample import Sample, SampleSettings, build_sample
from internvl_trainer.data.sampler import Position
from internvl_trainer.errors import UserError
from internvl_trainer.signals import die_with_parent, only_default_signals

_PREFETCHED = 4  # micro-batches that each worker prepares ahead
PATIENCE_SECONDS = 60  # to retry while storage is unavailable and a row's media are read

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Failure:
    """An error of a worker process as plain data, because exceptions do not pickle reliably."""

    reason: str
    message: str
    where: str | None
    kind: type[UserError] = UserError

    def error(self) -> UserError:
        """The error, to raise in the process that ends the run."""
        return self.kind(self.reason, self.message, self.where)


class RowDataset(Dataset[Sample | Failure]):
    """All rows of one epoch over all datasets, by position, so that every attempt draws the same augmentation.

    With `seed` None nothing is random: no augmentation, and the middle frames of a video.
    """

    def __init__(
        self,
        datasets: Sequence[OpenDataset],
        settings: SampleSettings,
        tokenizer: PreTrainedTokenizerBase,
        open_media: OpenMedia,
        *,
        seed: int | None,
        bad_lines: Mapping[str, Sequence[int]],
        sample: int | None = None,
    ) -> None:
        """`sample`: rows of each dataset that preflight checked; None: all."""
        self._sample = sample
        self._datasets, self._settings, self._tokenizer = datasets, settings, tokenizer
        self._open_media, self._seed = open_media, seed
        self._rows = [dataset.epoch_rows(bad_lines.get(dataset.description.name, ())) for dataset in datasets]
        self._ends = np.cumsum([len(rows) for rows in self._rows])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: Position) -> Sample | Failure:
        source, number = self._find(position.row)
        dataset = self._datasets[source]
        rng = None if self._seed is None else np.random.default_rng([self._seed, position.epoch, position.row])
        row, findings = dataset.parse_row(number)
        if row is None:
            return unusable_row(errors_of(findings)[0], self._sample)
        try:
            build = patiently(PATIENCE_SECONDS)(build_sample)
            open_media = dataset.media_opener(self._open_media)
            sample = build(row, dataset.description, self._settings, self._tokenizer, open_media, rng)
        except RowError as error:
            return unusable_row(error.findings[0].at(row.file, row.line), self._sample)
        except UserError as error:
            return Failure(error.reason, error.message, error.where, type(error))
        sample.source = source
        return sample

    def chat_row(self, position: int) -> tuple[OpenDataset, ChatRow | None]:
        """The dataset of a row, and the row as it is written; None for one that cannot be read now."""
        source, number = self._find(position)
        return self._datasets[source], self._datasets[source].parse_row(number)[0]

    @property
    def names(self) -> list[str]:
        """Names of the datasets, by their number."""
        return [dataset.description.name for dataset in self._datasets]

    def mixed(self, temperature: float | None, seed: int) -> MixedRows | None:
        """The rows of each epoch by the datasets' weights or a temperature; None: each row once."""
        descriptions = [dataset.description for dataset in self._datasets]
        return mixed_rows(descriptions, [len(rows) for rows in self._rows], temperature, seed)

    def sizes(self, counted: RowSizes) -> np.ndarray:
        """(rows, 2) tokens and tiles of each row, as preflight counted them."""
        return np.concatenate(
            [counted[dataset.description.name][rows] for dataset, rows in zip(self._datasets, self._rows, strict=True)]
        )

    def estimate_lengths(self, image_tokens: int) -> np.ndarray:
        """(rows,) estimated lengths in tokens, to group rows by length when preflight has not run."""
        return np.concatenate(
            [
                estimate_lengths((dataset.index[int(row)] for row in rows), image_tokens)
                for dataset, rows in zip(self._datasets, self._rows, strict=True)
            ]
        )

    def _find(self, row: int) -> tuple[int, int]:
        """Number of the dataset, and row of its file."""
        which = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[which - 1]) if which else 0
        return which, int(self._rows[which][row - first])


def unusable_row(finding: Finding, sample: int | None) -> Failure:
    """The failure of a row that cannot be used, although preflight accepted it or did not check it.

    Args:
        sample: rows of each dataset that preflight checked; None: all.
    """
    advice = "did it change after preflight?"
    if sample is not None:
        advice = (
            f"preflight checked {sample:,} rows of each dataset (data.preflight.sample), perhaps not this one; correct "
            "it, or remove the setting to find every bad row at once"
        )
    return Failure(finding.reason, f"{finding}; {advice}", None)


class PackDataset(Dataset[list[Sample] | Failure]):
    """Packs of rows, by the positions of their rows."""

    def __init__(self, rows: RowDataset, max_tokens: int) -> None:
        self._rows, self._max_tokens = rows, max_tokens

    def __getitem__(self, pack: Pack) -> list[Sample] | Failure:
        samples = []
        for position in pack:
            sample = self._rows[position]
            if isinstance(sample, Failure):
                return sample
            samples.append(sample)
        found = sum(sample.length for sample in samples)
        if len(samples) > 1 and found > self._max_tokens:
            message = f"a pack planned for {self._max_tokens} tokens has {found}; did its rows change after preflight?"
            return Failure("RowsChanged", message, "spec.data")
        return samples


@dataclass(frozen=True)
class Collation:
    """How samples become tensors: all rows of a micro-batch, packed or not, are one sequence.

    With `sources` a batch also has `sources`, the number of each supervised position's dataset, which is not the
    model's.
    """

    image_token_id: int
    weighting: Weighting = "token"
    sources: bool = False

    def __call__(self, draws: Sequence[Sample | list[Sample] | Failure]) -> MicroBatch | Failure:
        """The batch of rows or packs, or the first failure among them."""
        if failure := next((draw for draw in draws if isinstance(draw, Failure)), None):
            return failure
        samples: list[Sample] = []
        for draw in draws:
            samples += draw if isinstance(draw, list) else [draw] if isinstance(draw, Sample) else []
        tensors = collate(samples, self.weighting, image_token_id=self.image_token_id)
        if self.sources:
            tensors["sources"] = source_numbers(samples)
        return _counted(tensors, samples)


class MicroBatch(NamedTuple):
    """The tensors of one forward pass and its counts: `weight` sums the loss weights, `places` includes padding."""

    tensors: Batch
    rows: int
    tokens: int
    places: int
    supervised_tokens: int
    weight: float


Collate = Callable[[Sequence[Any]], MicroBatch | Failure]
"""Draws of a dataset to one batch; it is pickled for worker processes."""


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step on one rank, with this rank's counts.

    Attributes:
        weights: sum of the loss weights of each micro-batch.
        waited: seconds.
    """

    batches: list[Batch]
    weights: list[float]
    supervised_tokens: int
    rows: int
    tokens: int
    places: int
    waited: float


class Loader:
    """Windows of micro-batches, in the sampler's order."""

    def __init__(
        self,
        dataset: Dataset[Any],
        windows: Iterable[list[list[Any]]],
        *,
        collation: Collate,
        workers: int,
        pin_memory: bool,
    ) -> None:
        """`windows`: the draws of each micro-batch of each step, at least one a step."""
        self._lengths: deque[int] = deque()  # of the windows that workers have begun
        self._batches = iter(
            DataLoader(
                dataset,
                batch_sampler=self._flat(windows),
                num_workers=workers,
                collate_fn=collation,
                pin_memory=pin_memory,
                prefetch_factor=_PREFETCHED if workers else None,
                worker_init_fn=_own_signals,
            )
        )

    def window(self) -> Window:
        """The next optimizer step's micro-batches. Raises UserError for a row that cannot be read."""
        began = time.monotonic()
        batches = [self._next()]
        batches += [self._next() for _ in range(self._lengths.popleft() - 1)]
        return Window(
            batches=[batch.tensors for batch in batches],
            weights=[batch.weight for batch in batches],
            supervised_tokens=sum(batch.supervised_tokens for batch in batches),
            rows=sum(batch.rows for batch in batches),
            tokens=sum(batch.tokens for batch in batches),
            places=sum(batch.places for batch in batches),
            waited=time.monotonic() - began,
        )

    def _flat(self, windows: Iterable[list[list[Any]]]) -> Iterator[list[Any]]:
        for window in windows:
            self._lengths.append(len(window))
            yield from window

    def _next(self) -> MicroBatch:
        batch: MicroBatch | Failure = next(self._batches)
        if isinstance(batch, Failure):
            raise batch.error()
        return batch


def _counted(tensors: Batch, samples: Sequence[Sample]) -> MicroBatch:
    supervised = tensors["supervised"]
    count = len(supervised)
    weights = tensors.get("loss_weights")
    return MicroBatch(
        tensors=tensors,
        rows=len(samples),
        tokens=sum(sample.length for sample in samples),
        places=tensors["input_ids"].numel(),
        supervised_tokens=count,
        weight=float(count) if weights is None else float(weights[0, supervised + 1].double().sum()),
    )


def _own_signals(_worker: int) -> Any:
    """A worker ends with the loop, not by the Ctrl-C that stops the run."""
    die_with_parent()
    only_default_signals()

"""The loss of each dataset: exact sums over batches and packs, and where a run records them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from internvl_api.constants import ExitCode
from internvl_trainer.data.collate import collate, source_numbers
from internvl_trainer.data.sample import Sample
from internvl_trainer.metrics import MOST_DATASETS, Reporter
from internvl_trainer.train.metrics_log import StepRecord
from internvl_trainer.train.step_losses import StepLosses
from internvl_trainer.train.trainer import Trainer
from trainer.runs import GOLDEN, environment, make_config, started, write_config


def sample(source: int, labels: list[int]) -> Sample:
    ids = np.arange(len(labels), dtype=np.int64)
    blank = np.zeros((1, 3, 2, 2), np.uint8)
    return Sample(ids, np.array(labels, np.int64), blank, np.zeros(1, np.int64), source=source)


ROWS = [sample(1, [-100, 5, 6]), sample(0, [-100, -100, 7, 8, 9]), sample(1, [-100, 4])]


def test_each_token_counts_for_its_dataset() -> None:
    batch = collate(ROWS)
    tokens = batch["labels"][0, batch["supervised"] + 1].float()  # the loss of a token is its label
    losses = StepLosses(["a", "b", "never"])
    for _ in range(2):
        losses.add(tokens.sum(), tokens, source_numbers(ROWS))
    total, parts = losses.read()
    assert total == 2 * (5 + 6 + 7 + 8 + 9 + 4)
    assert losses.means(parts) == {"a": 8.0, "b": 5.0}


def test_ranks_add_up() -> None:
    ranks = [StepLosses(["a", "b"]) for _ in range(2)]
    for rank, loss in zip(ranks, (1.0, 3.0), strict=True):
        rank.add(torch.tensor(2 * loss), torch.full((2,), loss), torch.zeros(2, dtype=torch.int64))
    totals = [sum(values) for values in zip(*(rank.read()[1] for rank in ranks), strict=True)]
    assert ranks[0].means(totals) == {"a": 2.0}


def test_a_single_dataset_has_no_other_loss_than_the_run() -> None:
    losses = StepLosses(["a"])
    losses.add(torch.tensor(3.0))
    total, parts = losses.read()
    assert total == 3.0
    assert losses.means(parts) is None


def scraped(reporter: Reporter) -> dict[str, float]:
    """Loss by the label `dataset` of /metrics."""
    answer = reporter.answer("/metrics")
    assert answer is not None
    found = re.findall(r'^internvl_train_dataset_loss{dataset="([^"]*)",.*} (.*)$', answer[1].decode(), re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_prometheus_has_the_last_loss_of_each_dataset() -> None:
    reporter = Reporter("team/run", "train")
    assert scraped(reporter) == {}
    reporter.dataset_losses.set({"text": 2.5, "validation of a meta": 1.0})
    reporter.dataset_losses.set({"text": 2.0})
    assert scraped(reporter) == {"text": 2.0, "validation of a meta": 1.0}


def test_names_of_a_meta_cannot_flood_prometheus() -> None:
    reporter = Reporter("team/run", "train")
    reporter.dataset_losses.set({f"{'long' * 200}{number}": 1.0 for number in range(1000)} | {"late": 1.0})
    labels = scraped(reporter)
    assert len(labels) == MOST_DATASETS
    assert max(map(len, labels)) < 110
    reporter.dataset_losses.set({"\udc00": 1.0})
    assert reporter.answer("/metrics")


def test_a_step_sets_the_gauge_beside_the_log() -> None:
    reporter = Reporter("team/run", "train")
    setup = SimpleNamespace(total_steps=9)
    context = SimpleNamespace(group=SimpleNamespace(device=torch.device("cpu")))
    trainer = SimpleNamespace(reporter=reporter, durations=[], setup=setup, log=None, context=context)
    Trainer._record(cast(Trainer, trainer), STEP)
    assert scraped(reporter) == {"a": 1.5, "b": 0.5}


STEP = StepRecord(
    step=1,
    epoch=0.1,
    loss=1.0,
    learning_rate=0.1,
    gradient_norm=1.0,
    supervised_tokens=1,
    tokens=1,
    places=1,
    samples=1,
    step_seconds=1.0,
    data_wait_seconds=0.0,
    world_size=1,
    dataset_losses={"a": 1.5, "b": 0.5},
)


@pytest.mark.slow
def test_a_run_records_the_losses_of_its_datasets(tmp_path: Path) -> None:
    rows = (GOLDEN / "data" / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, kept in (("text", rows[:2]), ("pictures", rows[2:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(kept), encoding="utf-8")
    datasets = {
        name: {"annotation": str(tmp_path / f"{name}.jsonl"), "root": str(GOLDEN / "data"), "weight": weight}
        for name, weight in (("text", 3), ("pictures", 1))
    }
    held = {name: {**each, "weight": None} for name, each in datasets.items()}
    data = {"train": datasets, "validation": held}
    sections = {"data": data, "evaluation": {"everySteps": 5}, "training": {"maxSteps": 5}}
    config = write_config(make_config(str(tmp_path / "out"), **sections), tmp_path)
    with started(["train", "--config", str(config)], environment(tmp_path), tmp_path / "result") as stage:
        assert stage.wait() == ExitCode.OK, stage.output
    steps = [json.loads(line) for line in (tmp_path / "out/stages/train/metrics.jsonl").read_text().splitlines()]
    for step in steps:
        own = step["dataset_losses"]
        assert min(own.values()) - 1e-5 <= step["loss"] <= max(own.values()) + 1e-5  # sums of fp32
    assert {"text", "pictures"} == set().union(*(step["dataset_losses"] for step in steps))
    assert set(steps[-1]["validation_losses"]) == {"text", "pictures"}
    own = steps[-1]["validation_losses"].values()
    assert min(own) < steps[-1]["validation_loss"] < max(own)

"""A loss that rises and stays high is found by a rule that any attempt computes alike."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from internvl_trainer.errors import UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.train.loss_watch import LossRise, LossWatch
from internvl_trainer.train.trainer import Trainer
from trainer.contexts import Alone


def watch(losses: Sequence[float], rates: Sequence[float] | None = None, total: int | None = None) -> LossRise | None:
    rates = rates or [1e-2] * len(losses)
    watcher = LossWatch(total or len(losses))
    for step, (loss, rate) in enumerate(zip(losses, rates, strict=True), start=1):
        watcher.add({"step": step, "loss": loss, "learning_rate": rate})
    return watcher.found


def test_the_first_rise_is_kept_with_its_rate() -> None:
    losses = [0.5] * 30 + [8.0] * 10 + [80.0] * 20 + [0.5] * 40
    rates = [step * 1e-4 for step in range(1, 36)] + [1e-5] * 65
    found = watch(losses, rates)
    assert found is not None
    # 0.5 is the loss of step 1 already; the mean of 10 steps exceeds 10 x 0.5 with seven steps of 8
    assert (found.low_step, found.low, found.step) == (1, 0.5, 37)
    assert found.high == pytest.approx((3 * 0.5 + 7 * 8.0) / 10)
    assert found.peak_rate == 35e-4
    assert str(found) == (
        "LossRises: the mean loss of 10 steps rose from 0.5 (up to step 1) to 5.75 (up to step 37) with learning "
        "rates up to 0.0035; lower training.learningRate, raise training.warmupRatio, or look at the rows of those "
        "steps"
    )


RISES = {
    "tenfold": [0.7] * 20 + [7.2] * 20,
    "a model that begins to guess": [2.5] * 20 + [11.5] * 20,
    "slowly": [0.4 * 1.06**step for step in range(100)],
    "after falling": [2.0 / (1 + step) for step in range(40)] + [1.5] * 20,
    "before the first mean": [0.6] + [9.0] * 30,
    "from the first step on": [4.0] + [12.0] * 30,
    "a short run": [1.0] * 6 + [30.0] * 6,
    "to infinity and back": [1.0] * 15 + [math.inf] + [1.0] * 15,
}


@pytest.mark.parametrize("case", RISES)
def test_a_rise_is_found(case: str) -> None:
    assert watch(RISES[case]) is not None


NO_RISES = {
    "falls": [5.0 * 0.95**step for step in range(200)],
    "noise": [1.0 + random.Random(7).random() * 3 for _ in range(200)],
    "one bad batch": [0.6] * 30 + [40.0] + [0.6] * 30,
    "an easy first batch": [0.05] + [1.2] * 30,
    "near zero": [0.001] * 30 + [0.4] * 30,
    "three datasets in blocks": ([0.4] * 15 + [2.8] * 15) * 6,
    "two steps": [1.0, 300.0],
    "no step": [],
}


@pytest.mark.parametrize("case", NO_RISES)
def test_what_is_no_rise(case: str) -> None:
    assert watch(NO_RISES[case]) is None


def test_a_resumed_attempt_finds_the_same() -> None:
    losses = [0.5] * 30 + [8.0] * 30
    first, second = LossWatch(60), LossWatch(60)
    rows = [{"step": step, "loss": loss, "learning_rate": 1e-3} for step, loss in enumerate(losses, start=1)]
    told = [row["step"] for row in rows if first.add(row)]
    for row in rows[:35]:  # as restored from the checkpoint's metrics
        second.add(row)
    assert [row["step"] for row in rows[35:] if second.add(row)] == told
    assert first.found == second.found


def test_a_loss_that_is_no_number_keeps_the_rise_before_it() -> None:
    """Also in the attempt that resumed after the rise."""
    rows = [{"step": step, "loss": 0.5 if step < 20 else 9.0, "learning_rate": 0.1} for step in range(1, 31)]
    reporter = Reporter("team/run", "train")
    setup: Any = SimpleNamespace(total_steps=60)
    config = SimpleNamespace(training=SimpleNamespace(early_stopping=None))
    context: Any = SimpleNamespace(reporter=reporter, group=Alone(), config=config)
    log: Any = SimpleNamespace(rows=lambda: rows, validations=lambda: [])
    stop: Any = None
    checkpoints: Any = SimpleNamespace(newest=None, in_flight=None)
    trainer = Trainer(context, setup, checkpoints, log, stop, 30)
    assert reporter.progress.warning == trainer.warning
    trainer.loss = math.nan
    with pytest.raises(UserError) as refused:
        trainer._refuse_nan(30)
    assert refused.value.reason == "LossNotFinite"
    assert refused.value.message.startswith(
        "the loss is nan at step 31; the weights were not touched and the checkpoint"
    )
    assert refused.value.message.endswith(f". Before, {trainer.warning}")

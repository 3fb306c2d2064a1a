"""Which checkpoints a stop and the last step of training save."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from internvl_api.spec import EarlyStopping
from internvl_trainer.metrics import Reporter
from internvl_trainer.train.held_out import HeldOut
from internvl_trainer.train.optimizer_shards import KINDS, WEIGHT
from internvl_trainer.train.saver import Saver
from trainer.contexts import Alone

TOTAL_STEPS = 9


class Stored:
    """Checkpoints of which one may be in flight; `saves` has the step and the kinds of each that was begun."""

    def __init__(self, in_flight: Any = None) -> None:
        self.in_flight, self.newest, self.saved = in_flight, None, None
        self.saves: list[tuple[int, tuple[str, ...]]] = []
        self.said: list[dict[str, Any]] = []

    def save(self, _engine: Any, step: int, _log: Any, *, kinds: Sequence[str], **about: Any) -> None:
        self.saves.append((step, tuple(kinds)))
        self.said.append(about)

    def finish(self) -> None:
        self.in_flight = None


def saver(stored: Stored, *, step: int = 5, grace: int | None = None, last_step: str = "weights") -> Saver:
    config = SimpleNamespace(
        grace_seconds=grace, processes_per_worker=1, checkpoint=SimpleNamespace(last_step=last_step)
    )
    context: Any = SimpleNamespace(
        reporter=Reporter("team/run", "train"),
        group=Alone(),
        config=config,
        stages=SimpleNamespace(claim_output=lambda: None),
    )
    setup: Any = SimpleNamespace(engine=None, total_steps=TOTAL_STEPS)
    checkpoints: Any = stored
    stop: Any = SimpleNamespace(seconds=0.0)
    return Saver(context, setup, checkpoints, None, stop, [], step)


def flight(size: int) -> SimpleNamespace:
    return SimpleNamespace(step=5, size=size, sent=0, began=time.monotonic())


@pytest.mark.parametrize(
    ("stored", "step", "grace", "saves"),
    [
        pytest.param(Stored(), 7, 1, [(7, KINDS)], id="none in flight"),
        pytest.param(Stored(), 5, 1, [], id="no step since the last one"),
        pytest.param(Stored(flight(10**9)), 7, 60, [(7, KINDS)], id="time for both"),
        pytest.param(Stored(flight(10**12)), 7, 60, [], id="time for the one in flight alone"),
        pytest.param(Stored(flight(10**12)), 7, None, [(7, KINDS)], id="no limit"),
    ],
)
def test_a_stop_saves_the_steps_since_the_last_checkpoint_where_there_is_time(
    stored: Stored, step: int, grace: int | None, saves: list[Any]
) -> None:
    kept = saver(stored, grace=grace).save_before_stop(step)
    assert stored.saves == [(number, tuple(kinds)) for number, kinds in saves]
    assert stored.in_flight is None, "it waits for the one in flight"
    lost = step > 5 and not saves
    assert kept == (" with the checkpoint of step 5: the grace period has no time for another" if lost else "")


@pytest.mark.parametrize(("last_step", "kinds"), [("weights", (WEIGHT,)), ("full", tuple(KINDS))])
def test_the_checkpoint_after_the_last_step_has_what_the_spec_says(last_step: str, kinds: tuple[str, ...]) -> None:
    stored = Stored()
    saving = saver(stored, last_step=last_step)
    saving.save(TOTAL_STEPS - 1)
    saving.save(TOTAL_STEPS)
    assert stored.saves == [(TOTAL_STEPS - 1, tuple(KINDS)), (TOTAL_STEPS, kinds)]
    assert saving.step == TOTAL_STEPS


@pytest.mark.parametrize(("last_step", "kinds"), [("weights", (WEIGHT,)), ("full", tuple(KINDS))])
def test_the_checkpoint_after_which_training_ends_early_is_the_last_one(last_step: str, kinds: tuple[str, ...]) -> None:
    stored = Stored()
    saving = saver(stored, last_step=last_step)
    saving.held_out = HeldOut(EarlyStopping(patience=1), [(4, 1.0)])
    saving.save(6)
    saving.held_out.add(7, 2.0)
    saving.save(7)
    assert stored.saves == [(6, tuple(KINDS)), (7, kinds)]
    assert stored.said == [{"best": 4, "is_last": False}, {"best": 4, "is_last": True}]

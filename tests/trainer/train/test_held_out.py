"""Which step is the best, and when training ends early: functions of the losses on held-out rows."""

from __future__ import annotations

from typing import Any

import pytest
from internvl_api.spec import EarlyStopping
from internvl_trainer.train.held_out import Best, HeldOut, choose_best

LOSSES = [(2, 3.0), (4, 2.0), (6, 2.5), (8, 1.95), (10, 2.1), (12, 2.2)]


def ended_after(losses: list[tuple[int, float]], *, total_steps: int | None = None, **stopping: Any) -> int | None:
    """The step after which training ends."""
    held_out = HeldOut(EarlyStopping(**stopping), total_steps=total_steps)
    for step, loss in losses:
        held_out.add(step, loss)
        if held_out.ended:
            return step
    return None


@pytest.mark.parametrize(
    ("stopping", "step"),
    [
        pytest.param({"patience": 1}, 6, id="the first that is not lower"),
        pytest.param({"patience": 2}, 12, id="two in a row: an improvement starts the count again"),
        pytest.param({"patience": 3}, None, id="never three in a row"),
        pytest.param({"patience": 3, "min_delta": 0.1}, 10, id="lower by too little is no improvement"),
        pytest.param({"patience": 2, "min_delta": 0.1}, 8, id="and counts at once"),
    ],
)
def test_when_training_ends(stopping: dict[str, Any], step: int | None) -> None:
    assert ended_after(LOSSES, **stopping) == step


def test_many_small_improvements_add_up_to_one() -> None:
    slow = [(step, 2.0 - 0.04 * step) for step in range(1, 20)]
    assert ended_after(slow, patience=3, min_delta=0.1) is None
    assert ended_after(slow, patience=2, min_delta=0.1) == 3


def test_an_equal_loss_is_no_improvement() -> None:
    assert ended_after([(1, 2.0), (2, 2.0), (3, 2.0)], patience=2) == 3


def test_the_last_step_ends_training_by_itself() -> None:
    assert ended_after(LOSSES, patience=2, total_steps=12) is None


def test_an_attempt_that_resumes_anywhere_decides_the_same() -> None:
    stopping = EarlyStopping(patience=2, min_delta=0.01)
    undisturbed = HeldOut(stopping, LOSSES)
    assert undisturbed.ended
    for known in range(len(LOSSES) + 1):
        resumed = HeldOut(stopping, LOSSES[:known])
        for step, loss in LOSSES[known:]:
            resumed.add(step, loss)
        assert (resumed.ended, resumed.lowest) == (undisturbed.ended, undisturbed.lowest)


@pytest.mark.parametrize(
    ("stopping", "message"),
    [
        pytest.param(
            EarlyStopping(patience=2, min_delta=0.1),
            "ended after step 8: none of the last 2 losses on data.validation is more than 0.1 below the 2.0000 of "
            "step 4 (training.earlyStopping)",
            id="several",
        ),
        pytest.param(
            EarlyStopping(patience=1),
            "ended after step 6: the last loss on data.validation is not below the 2.0000 of step 4 "
            "(training.earlyStopping)",
            id="one",
        ),
    ],
)
def test_the_reason_names_the_figures(stopping: EarlyStopping, message: str) -> None:
    held_out = HeldOut(stopping)
    for step, loss in LOSSES:
        if held_out.ended is None:
            held_out.add(step, loss)
    assert held_out.ended == message


def test_the_lowest_loss_does_not_wait_for_min_delta() -> None:
    held_out = HeldOut(EarlyStopping(patience=9, min_delta=1.0), [(1, 2.0), (2, 1.9), (3, 1.9)])
    assert held_out.lowest == Best(2, 1.9), "the first of several equal ones"


def test_a_log_line_says_what_follows() -> None:
    held_out = HeldOut(EarlyStopping(patience=1), [(1, 2.0)])
    assert held_out.note_of(1) == ", the lowest so far"
    held_out.add(2, 3.0)
    assert held_out.note_of(2).startswith("; the lowest is 2.0000 of step 1; training ended after step 2")


def test_the_best_step_is_exported() -> None:
    asked: list[int] = []
    exported = choose_best(HeldOut(None, LOSSES), 12, lambda step: asked.append(step) is None)
    assert asked == [8]
    assert exported.about == {
        "step": 8,
        "validationLoss": 1.95,
        "note": "exports the weights of step 8, whose loss on data.validation is 1.9500, the lowest",
    }


def test_the_last_step_needs_no_loading_when_it_is_the_best() -> None:
    exported = choose_best(HeldOut(None, [(2, 2.0), (4, 1.0)]), 4, lambda _: pytest.fail("it is loaded"))
    assert (exported.step, exported.loss) == (4, 1.0)


def test_without_a_whole_checkpoint_the_next_best_is_exported_and_said() -> None:
    exported = choose_best(HeldOut(None, LOSSES), 12, lambda step: step == 10)
    assert exported.step == 10
    assert exported.note == (
        "exports the weights of step 10, whose loss on data.validation is 2.1000; those of lower losses have no whole "
        "checkpoint: step 8 (1.9500), 4 (2.0000)"
    )

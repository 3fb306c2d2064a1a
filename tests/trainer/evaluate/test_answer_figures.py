"""What is told of answers without their references, and how sure a difference is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from internvl_api.publish_condition import ANSWER_METRICS
from internvl_trainer.answer_figures import answer_figures, repetition
from internvl_trainer.evaluate.results import score_rows, summary
from internvl_trainer.report.bootstrap import FEWEST_ROWS, mean_intervals


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        pytest.param("[" * 30, 0.9, 1, id="one mark"),
        pytest.param("a" * 60, 0.8, 1, id="one letter"),
        pytest.param("\u732b" * 12, 0.8, 1, id="one character of a script without spaces"),
        pytest.param("a blue square, " * 6, 0.7, 1, id="a phrase"),
        pytest.param("A man in a red shirt rides a wave on top of a surfboard in the sea.", 0, 0, id="a caption"),
        pytest.param("<ref>the dog on the left</ref><box>[[10, 20, 300, 400]]</box>", 0, 0.05, id="a box"),
        pytest.param("\u4e00\u53ea\u732b\u5750\u5728\u6728\u684c\u5b50\u4e0a\u3002", 0, 0, id="a Chinese caption"),
        pytest.param("yes", 0, 0, id="a word"),
        pytest.param("", 0, 0, id="empty"),
    ],
)
def test_repetition(text: str, least: float, most: float) -> None:
    assert least <= repetition(text) <= most


def _rows(*texts: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"prediction": text, "references": ["a dog"], **fields} for text in texts]


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        pytest.param(_rows(*["a blue square"] * 10, at_limit=False), (0.1, 0, 0, 0), id="all the same"),
        pytest.param(_rows("A dog.", "a  dog.", "a cat", "", at_limit=False), (0.75, 0, 0.25, 0), id="case and spaces"),
        pytest.param(
            [*_rows("a", at_limit=True), *_rows("b", "c", "d", at_limit=False)], (1, 0.25, 0, 0), id="one cut"
        ),
    ],
)
def test_answer_figures(rows: list[dict[str, Any]], wanted: tuple[float, ...]) -> None:
    assert answer_figures(rows) == dict(zip(ANSWER_METRICS, wanted, strict=True))


def test_rows_that_do_not_say_how_they_ended_are_not_taken_for_whole() -> None:
    assert "answers_at_limit" not in answer_figures([*_rows("a", at_limit=True), *_rows("b")])
    assert answer_figures([]) == {}


def test_figures_of_answers_stand_beside_the_tasks_own() -> None:
    rows = _rows("a dog", "a cat", at_limit=False)
    figures, scored = score_rows("mine", "vqa", rows)
    assert figures == {
        "exact_match": 0.5, "vqa_accuracy": 0.5,
        "distinct_answers": 1.0, "answers_at_limit": 0.0, "empty_answers": 0.0, "repetition": 0.0,
    }  # fmt: skip
    assert scored[0] == {**rows[0], "scores": {"exact_match": 1.0, "vqa_accuracy": 1.0}}
    assert summary({"mine": figures}) == "mine: exact_match 0.5000, vqa_accuracy 0.5000"


@pytest.mark.parametrize(
    ("differences", "excludes_zero"),
    [
        pytest.param([0.3] * 8 + [0.1] * 8, True, id="a gain"),
        pytest.param([-0.3] * 8 + [-0.1] * 8, True, id="a loss"),
        pytest.param([0.5, -0.5] * 8, False, id="noise"),
        pytest.param([0.0] * 15 + [1.0], False, id="one lucky row"),
        pytest.param([0.0] * 16, False, id="no difference"),
    ],
)
def test_an_interval_excludes_zero_only_for_what_is_no_chance(differences: list[float], excludes_zero: bool) -> None:
    table = np.array(differences)[:, None]
    (interval,) = mean_intervals(table)
    assert interval is not None
    assert interval.low <= table.mean() <= interval.high
    assert interval.excludes_zero is excludes_zero
    assert mean_intervals(table) == [interval], "the same each time"


def test_an_interval_is_as_wide_as_the_normal_approximation() -> None:
    table = np.random.default_rng(1).normal(0.2, 1.0, size=(400, 2))
    for column, interval in zip(table.T, mean_intervals(table), strict=True):
        assert interval is not None
        width = 1.96 * column.std() / 400**0.5
        assert (interval.low, interval.high) == pytest.approx(
            (column.mean() - width, column.mean() + width), abs=0.15 * width
        )


def test_few_rows_have_no_interval() -> None:
    assert mean_intervals(np.ones((FEWEST_ROWS - 1, 2))) == [None, None]

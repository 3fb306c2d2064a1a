"""Red, amber or green: collapsed, noisy and truly better models."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from internvl_api.publish_condition import ANSWER_METRICS
from internvl_trainer.report.comparison import Outcome, compare
from internvl_trainer.report.judgement import TaskEvidence, evidence, judge
from internvl_trainer.report.page import banner, render_page
from internvl_trainer.report.record import Record, Row
from trainer.runs import GOLDEN, make_config


def task(
    outcome: Outcome | None = "gain",
    *,
    rows: int = 100,
    distinct: float = 0.9,
    at_limit: float = 0.0,
    empty: float = 0.0,
    repetition: float = 0.0,
    wanted: float = 1.0,
    wanted_repetition: float = 0.0,
) -> TaskEvidence:
    answers = dict(zip(ANSWER_METRICS, (distinct, at_limit, empty, repetition), strict=True))
    references = {"distinct_answers": wanted, "empty_answers": 0.0, "repetition": wanted_repetition}
    return TaskEvidence("coco", rows, answers, references, outcome)


@pytest.mark.parametrize(
    ("tasks", "colour", "reason"),
    [
        pytest.param([task()], "good", "better than the base model: coco", id="better"),
        pytest.param([task(None)], "good", "", id="no base model to compare with"),
        pytest.param([], "good", "", id="no tasks"),
        pytest.param([task("noise")], "open", "the difference may be chance: coco", id="noise"),
        pytest.param([task("unknown")], "open", "too few rows", id="too few rows"),
        pytest.param([task("loss")], "bad", "worse than the base model: coco", id="worse"),
        pytest.param([task("gain"), task("loss")], "open", "worse than the base model: coco", id="better and worse"),
        pytest.param([task("gain"), task("noise")], "good", "better", id="one better, one as before"),
        pytest.param([task(rows=10, distinct=0.1)], "bad", "1 in 10 rows (distinct references: 10)", id="one answer"),
        pytest.param([task(distinct=0.09)], "bad", "9 in 100 rows", id="a few answers"),
        pytest.param([task(distinct=0.02, wanted=0.02)], "good", "", id="yes or no"),
        pytest.param([task(distinct=0.01, wanted=0.02)], "open", "1 in 100 rows", id="always no"),
        pytest.param([task(distinct=0.01, wanted=0.03)], "bad", "1 in 100 rows", id="always the same of three"),
        pytest.param([task(distinct=0.01, wanted=0.01)], "good", "", id="one reference for all"),
        pytest.param([task(rows=5, distinct=0.2)], "open", "1 in 5 rows", id="one answer to few rows"),
        pytest.param([task(distinct=0.24)], "open", "24 in 100 rows", id="little variety"),
        pytest.param([task(empty=0.6)], "bad", "60% of the answers to coco are empty", id="empty"),
        pytest.param([task(empty=0.06)], "open", "6% of the answers to coco are empty", id="some empty"),
        pytest.param([task(repetition=0.95)], "bad", "repetition 0.95", id="a mark without end"),
        pytest.param([task(repetition=0.2)], "open", "repetition 0.20", id="some repetition"),
        pytest.param([task(repetition=0.3, wanted_repetition=0.25)], "good", "", id="references repeat too"),
        pytest.param([task(at_limit=0.3)], "open", "30% of the answers to coco are cut at maxNewTokens", id="cut"),
        pytest.param([task("noise", repetition=0.9), task()], "bad", "repetition", id="one of two collapsed"),
        pytest.param([TaskEvidence("flickr", 0, {}, {}, "gain")], "good", "better", id="no texts"),
    ],
)
def test_judge(tasks: list[TaskEvidence], colour: str, reason: str) -> None:
    found = judge(tasks)
    assert found.colour == colour
    assert reason in "; ".join(found.reasons)
    assert bool(found.headline) == (colour != "good")


SCORES = {"same": [0.5, 0.4, 0.6, 0.5] * 4, "noisy": [0.9, 0.1, 0.7, 0.4] * 4, "better": [0.8, 0.7, 0.9, 0.6] * 4}


def _record(before: str, after: str, *, answer: str = "answer {}", condition: str | None = None) -> Record:
    """A run of VQA on 16 rows, whose rows have the given scores."""

    def rows(scores: list[float], text: str) -> list[Row]:
        return [
            {"id": number, "image": "a.jpg", "question": "what?", "prediction": text.format(number), "at_limit": False,
             "references": [f"reference {number}"], "scores": {"vqa_accuracy": value}}
            for number, value in enumerate(scores)
        ]  # fmt: skip

    def figures(scores: list[float]) -> dict[str, dict[str, float]]:
        return {"mine": {"vqa_accuracy": sum(scores) / len(scores)}}

    settings: dict[str, Any] = {"task": "vqa", "annotation": str(GOLDEN / "data" / "samples.jsonl")}
    evaluation = {"tasks": {"mine": settings}, "baseline": True, **({"publishIf": condition} if condition else {})}
    old, new = SCORES[before], SCORES[after]
    return Record(
        make_config("/nowhere", evaluation=evaluation),
        trained=object(),  # type: ignore[arg-type]
        baseline=figures(old),
        final=figures(new),
        predictions={"mine": (rows(old, "base {}"), rows(new, answer))},
    )


@pytest.mark.parametrize(
    ("record", "colour", "headline", "text"),
    [
        pytest.param(
            _record("same", "better", condition="vqa_accuracy > 0.5"),
            "good",
            "The publishing condition was met",
            "Better than the base model: mine.",
            id="truly better",
        ),
        pytest.param(
            _record("same", "noisy", condition="vqa_accuracy > baseline.vqa_accuracy"),
            "open",
            "No gain over the base model",
            "the difference may be chance: mine. The publishing condition was met.",
            id="noisy",
        ),
        pytest.param(
            _record("same", "better", answer="a blue square on the table.", condition="vqa_accuracy > 0.1"),
            "bad",
            "The model has collapsed: do not use it",
            "distinct answers to mine: 1 in 16 rows (distinct references: 16). The publishing condition was met.",
            id="one answer to all",
        ),
        pytest.param(
            _record("same", "same", answer="[" * 40 + "{}"),
            "bad",
            "The model has collapsed: do not use it",
            "answers to mine repeat themselves",
            id="a mark without end",
        ),
        pytest.param(
            _record("same", "noisy", answer="[" * 40 + "{}", condition="vqa_accuracy > 0.9"),
            "bad",
            "Not published: the publishing condition was not met",
            "nothing was published",
            id="refused",
        ),
    ],
)
def test_the_banner(record: Record, colour: str, headline: str, text: str) -> None:
    found = banner(record, compare(record))
    assert found[:2] == (colour, headline)
    assert text in found[2]


@pytest.mark.parametrize(
    ("after", "shown", "classes"),
    [
        pytest.param("better", '<td class="number up">+0.2500', {"number up"}, id="a gain"),
        pytest.param("noisy", ", noise</small>", {"number "}, id="noise"),
    ],
)
def test_the_page_sells_no_noise_as_gain(after: str, shown: str, classes: set[str]) -> None:
    page = render_page(replace(_record("same", after), trained=None), {}, [], [])
    assert shown in page
    assert set(re.findall(r'<td class="(number \w*) *">[+\u2212]', page)) == classes


def test_a_figure_that_is_no_mean_of_its_rows_has_no_interval() -> None:
    record = _record("same", "better")
    assert [each.outcome for each in compare(record)["mine"]] == ["gain"]
    corpus = {"mine": {"vqa_accuracy": 0.99}}
    changed = Record(record.config, baseline=record.baseline, final=corpus, predictions=record.predictions)
    assert [each.outcome for each in compare(changed)["mine"]] == ["unknown"]
    assert evidence(changed, compare(changed))[0].outcome == "unknown"
    missing = Record(record.config, baseline=record.baseline, final=record.final, predictions={})
    assert [each.interval for each in compare(missing)["mine"]] == [None]

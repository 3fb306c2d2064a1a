"""What pods report, whatever they report, fits into a status that the API server accepts."""

import json
import math
from typing import Any

import pytest
from controller.builders import Raw, result
from controller.simulator import World
from internvl_api.status import Progress
from internvl_operator.core.telemetry import MAP_LIMIT, clean_text, read_answer, read_result


def body(text: str) -> Any:
    return read_answer(text.encode())


@pytest.mark.parametrize(
    ("text", "step", "loss"),
    [
        pytest.param('{"step": 3, "loss": 0.5}', 3, 0.5, id="right"),
        pytest.param('{"step": 3, "loss": NaN}', 3, None, id="nan"),
        pytest.param('{"step": 3, "loss": 1e999}', 3, None, id="too-large-for-a-double"),
        pytest.param('{"step": 3, "loss": -Infinity}', 3, None, id="infinite"),
        pytest.param('{"step": 12345678901234567890123456, "loss": 0.5}', None, 0.5, id="26-digits"),
        pytest.param('{"step": -9223372036854775809}', None, None, id="below-int64"),
        pytest.param('{"step": 9223372036854775807}', 2**63 - 1, None, id="largest-int64"),
        pytest.param('{"step": 3, "checkpoint": {"step": 1e999}}', 3, None, id="bad-checkpoint"),
        pytest.param('{"step": 3, "heartbeat": {"phase": "data", "idleSeconds": NaN}}', 3, None, id="bad-heartbeat"),
    ],
)
def test_numbers_that_no_status_can_hold_are_left_out(text: str, step: int | None, loss: float | None) -> None:
    found = body(text)
    assert (found.progress.step, found.progress.loss) == (step, loss)
    assert (found.checkpoint, found.heartbeat) == (None, None)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "3", '{"step": "many"}', "{" * 30_000, "[" * 60_000, '{"a":' * 10_000, '{"step": ' + "9" * 5000],
)
def test_anything_else_is_no_answer(text: str) -> None:
    assert body(text) is None


def test_strings_are_bounded_and_printable() -> None:
    found = body(json.dumps({"detail": "a\x1b[31mb\x00\u202ec" + "x" * 50_000}))
    assert found.progress.detail.startswith("abc")
    assert len(found.progress.detail) == 4096


@pytest.mark.parametrize(
    ("text", "limit", "clean"),
    [
        ("", 10, ""),
        ("  a\n b ", 10, "a\n b"),
        ("abcdef", 5, "abcd…"),
        ("\x00" * 100, 5, "…"),
        ("\x9b31mred", 10, "31mred"),
    ],
)
def test_clean_text(text: str, limit: int, clean: str) -> None:
    assert clean_text(text, limit) == clean


def test_a_result_keeps_its_word_when_its_figures_are_unusable() -> None:
    words: Raw = result("train", "failed", "R" * 500, message="\x1b]0;title\x07lost")
    words |= {"checkpoint": {"step": math.nan}, "evaluation": {"final": {"coco": {"CIDEr": math.inf, "BLEU": 0.5}}}}
    words |= {"artifacts": {f"a{number}": "s3://out" for number in range(1000)}}
    found = read_result(json.dumps(words))
    assert found is not None
    assert (found.outcome, found.message, len(found.reason)) == ("failed", "lost", 128)
    assert found.checkpoint is None
    assert found.evaluation is not None
    assert found.evaluation.final == {"coco": {"BLEU": 0.5}}
    assert len(found.artifacts) == MAP_LIMIT


def test_a_result_whose_parts_have_wrong_types_still_says_how_the_stage_ended() -> None:
    found = read_result(json.dumps(result("train", progress=7, artifacts=[], message=None)))
    assert found is not None
    assert (found.stage, found.outcome, found.progress, found.artifacts) == ("train", "succeeded", None, {})


@pytest.mark.slow
def test_a_run_that_reports_ever_new_artifacts_does_not_grow_its_status() -> None:
    world = World()
    world.reach("train")
    for attempt in range(10):
        made = {f"a{attempt}-{number}": "s3://out" for number in range(60)}
        world.end("train", 75, result("train", "resume", "Preempted", artifacts=made))
        world.later(3600)
        world.collect()
        world.run("train")
    assert len(world.status["artifacts"]) <= 256


def test_the_progress_column_is_one_short_line() -> None:
    world = World()
    world.reach("train")
    world.server.answers["run-train-0"] = Progress(detail="a\nb " + "x" * 5000)
    world.later(10)
    assert len(world.status.get("progressText") or "") <= 120


@pytest.mark.parametrize("attempt", ["9" * 40, "9" * 18, "9" * 9])
def test_a_forged_attempt_does_not_become_the_runs(attempt: str) -> None:
    world = World()
    world.reach("train")
    name = world.pods("train")[0]
    world.server.pods[name]["metadata"]["labels"]["internvl.dev/attempt"] = attempt
    world.operator.settle()
    assert world.status["attempt"] < 10


@pytest.mark.parametrize(
    "figure",
    ['"loss": "NaN"', '"loss": "-inf"', '"loss": "1e999"', '"loss": NaN', '"step": "99999999999999999999999999"'],
)
def test_a_number_that_no_status_can_hold_is_left_out_also_as_text(figure: str) -> None:
    answer = read_answer(f'{{"detail": "row 7", {figure}}}'.encode())
    assert answer is not None
    assert answer.progress.to_dict() == {"detail": "row 7"}


def test_a_metric_that_is_no_finite_number_is_left_out_also_as_text() -> None:
    metrics = {"final": {"task": {"a": "NaN", "b": 1}}}
    found = read_result(json.dumps(result("train", evaluation=metrics)))
    assert found is not None
    assert found.evaluation is not None
    assert found.evaluation.final == {"task": {"b": 1.0}}


def test_what_a_pod_says_holds_no_secret_of_an_address() -> None:
    said = "cannot read https://me:pw@data.example/x?X-Amz-Signature=abc and s3://KEY:SECRET@bucket/x"
    answer = read_answer(json.dumps({"detail": said}).encode())
    assert answer is not None
    assert answer.progress.detail == "cannot read https://data.example/x?… and s3://bucket/x"

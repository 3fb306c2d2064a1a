"""Which attempt took a step, as metrics.jsonl says."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from internvl_trainer.train.metrics_log import MetricsLog, StepRecord, restore_metrics_log
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEP = StepRecord(1, 0.1, 2.0, 1e-4, 1.0, 10, 100, 100, 4, 0.5, 0.1, 2)


def take(folder: Path, *numbers: int) -> None:
    """One attempt's steps."""
    log = MetricsLog(folder)
    for number in numbers:
        log.record(replace(STEP, step=number))
    log.close()


def attempts(folder: Path) -> list[tuple[int, int]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["attempt"]) for row in rows]


def test_each_start_is_the_next_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTERNVL_ATTEMPT", raising=False)
    take(tmp_path / "first", 1, 2)
    restore_metrics_log(tmp_path / "second", tmp_path / "first")
    take(tmp_path / "second", 3)
    assert attempts(tmp_path / "second") == [(1, 1), (2, 1), (3, 2)]


def test_the_operators_count_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_ATTEMPT", "4")
    take(tmp_path, 1)
    assert attempts(tmp_path) == [(1, 4)]


def test_a_step_that_was_not_validated_has_no_such_figure(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.record(STEP)
    log.record(replace(STEP, step=2, validation_loss=1.5))
    log.close()
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert "validation_loss" not in first
    assert second["validation_loss"] == 1.5


def test_a_loss_that_comes_late_goes_to_the_last_step(tmp_path: Path) -> None:
    take(tmp_path, 1, 2)
    log = MetricsLog(tmp_path)
    assert not log.is_validated
    log.add_validation(1.5, ended_early="ended after step 2")
    assert log.is_validated
    assert log.validations() == [(2, 1.5)]
    log.record(replace(STEP, step=3))
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row.get("validation_loss")) for row in rows] == [(1, None), (2, 1.5), (3, None)]
    assert [row.get("ended_early") for row in rows] == [None, "ended after step 2", None]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("validation/loss")
    assert [(event.step, event.value) for event in events] == [(2, 1.5)]


def test_answers_go_on_after_a_resume_and_tensorboard_has_text_and_picture(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 30, 30)).save(buffer, "JPEG")
    answered = {"row": 3, "question": "What?", "reference": "", "answer": "# <b>a cat</b>", "problem": None}
    log = MetricsLog(tmp_path / "first")
    log.record(STEP)
    assert not log.has_samples
    log.add_samples(0, [answered], {3: buffer.getvalue()})
    assert log.has_samples
    assert {"samples.jsonl", "samples/3.jpg"} <= log.files().keys()
    log.close()
    restore_metrics_log(tmp_path / "second", tmp_path / "first")
    log = MetricsLog(tmp_path / "second")
    assert log.has_samples
    log.add_samples(2, [answered], {})
    log.close()
    rounds = [json.loads(line) for line in (tmp_path / "second/samples.jsonl").read_text().splitlines()]
    assert [each["step"] for each in rounds] == [0, 2]
    events = EventAccumulator(str(tmp_path / "second/tensorboard")).Reload()
    assert [event.step for event in events.Tensors("samples/3/text_summary")] == [0, 2]
    shown = events.Tensors("samples/3/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "\n    # <b>a cat</b>" in shown, "code, and no markup"
    assert [event.step for event in events.Images("samples/3")] == [0]

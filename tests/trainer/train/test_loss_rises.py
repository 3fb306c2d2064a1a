"""A learning rate that ruins the model: training ends, and everything it leaves says what happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from internvl_api.constants import ExitCode
from internvl_trainer.report.page import render_page
from internvl_trainer.report.record import read_record
from trainer.contexts import store_of
from trainer.runs import environment, make_config, started, write_config

pytestmark = pytest.mark.slow


def test_the_first_cause_is_in_result_metrics_and_report(tmp_path: Path) -> None:
    training = {"learningRate": 0.5, "lrSchedule": "constant", "warmupRatio": 0.0, "maxSteps": 24}
    config = make_config(str(tmp_path / "out"), training=training, checkpoint={"everySteps": 24})
    command = ["train", "--config", str(write_config(config, tmp_path))]
    with started(command, environment(tmp_path), tmp_path / "result") as run:
        assert run.wait() == ExitCode.OK, run.output
        result = run.result
    assert "; LossRises: the mean loss of 10 steps rose from " in result.message
    assert result.progress is not None
    assert result.progress.warning is not None
    assert result.message.endswith(result.progress.warning)
    rows = [json.loads(line) for line in (tmp_path / "out/stages/train/metrics.jsonl").read_text().splitlines()]
    (warned,) = [row for row in rows if "warning" in row]
    assert (warned["warning"], warned["learning_rate"]) == (result.progress.warning, 0.5)
    record = read_record(store_of(config))
    assert record.warnings == [result.progress.warning]
    assert "LossRises: the mean loss of 10 steps" in render_page(record, {}, [], [])


def test_a_usual_run_is_not_warned_about(tmp_path: Path) -> None:
    config = make_config(str(tmp_path / "out"), training={"maxSteps": 24})
    command = ["train", "--config", str(write_config(config, tmp_path))]
    with started(command, environment(tmp_path), tmp_path / "result") as run:
        assert run.wait() == ExitCode.OK, run.output
        assert "LossRises" not in run.result.message
    assert read_record(store_of(config)).warnings == []

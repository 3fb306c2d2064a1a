"""The head of the report: date, time, hardware, and the advice about waiting for data."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from internvl_api.recipes.summary import recipe_config
from internvl_trainer.artifacts.manifest import Manifest
from internvl_trainer.report.head import data_advice, head_facts
from internvl_trainer.report.record import Record, StageEnd

CONFIG = recipe_config("internvl2-26b-full")
START = datetime(2026, 3, 1, 23, 50, tzinfo=UTC)


def step(number: int, wait: float, attempt: int = 1) -> dict[str, Any]:
    return {"step": number, "step_seconds": 1.0, "data_wait_seconds": wait, "world_size": 16, "attempt": attempt}


def shown(record: Record) -> dict[str, tuple[str, str]]:
    return {name: (value, note) for name, value, note in head_facts(record)}


def test_a_finished_run_has_its_date_and_total_time() -> None:
    ends = [
        StageEnd("preflight", START, None),
        StageEnd("train", START + timedelta(hours=3), timedelta(hours=3)),
        StageEnd("merge", START + timedelta(hours=3, minutes=5), timedelta(minutes=5)),
    ]
    found = shown(Record(config=CONFIG, stages=ends))
    assert found["Finished"] == ("2026-03-02", "02:55 UTC, end of merge")
    assert found["Total time"] == ("3 h 5 min", "from the end of preflight to the end of merge")


@pytest.mark.parametrize(
    ("told", "fact"),
    [
        ('{"gpuHours": 12.5, "cost": 31.25, "currency": "EUR"}', ("12.50", "cost 31.25 EUR")),
        ('{"gpuHours": 12.5}', ("12.50", "of all stages and attempts")),
        ("nonsense", None),
        ("", None),
    ],
)
def test_a_run_in_a_cluster_has_gpu_hours(
    told: str, fact: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERNVL_USAGE", told)
    assert shown(Record(config=CONFIG)).get("GPU-hours") == fact


def test_an_unfinished_run_has_the_date_of_its_last_stage() -> None:
    found = shown(Record(config=CONFIG, stages=[StageEnd("preflight", START, None), StageEnd("train", None, None)]))
    assert found["So far"] == ("2026-03-01", "23:50 UTC, end of preflight")
    assert not {"Finished", "Total time"} & found.keys()


@pytest.mark.parametrize(
    ("device", "value"),
    [
        pytest.param("NVIDIA H200", "16 × NVIDIA H200", id="named"),
        pytest.param(None, "16 × GPU", id="of an earlier version"),
        pytest.param({"a": 1}, "16 × GPU", id="no text"),
        pytest.param("x" * 500, "16 × " + "x" * 80, id="too long"),
    ],
)
def test_the_hardware_of_training(device: Any, value: str) -> None:
    trained = Manifest(fingerprint="x", files=[], extra={"device": device})
    assert shown(Record(config=CONFIG, steps=[step(1, 0.0)], trained=trained))["Hardware"][0] == value


def test_a_processor_has_processes() -> None:
    config = CONFIG.model_copy(update={"device": "cpu"})
    found = shown(Record(config=config, steps=[step(1, 0.0)]))["Hardware"]
    assert found == ("CPU", "16 processes, 1 worker asked for")


def test_much_waiting_names_the_setting_to_raise() -> None:
    advice = data_advice(Record(config=CONFIG, steps=[step(number, 0.25) for number in range(1, 8)]))
    assert advice is not None
    assert advice.startswith("Steps waited for data 25% of their time (expected at most 10%). Raise training.dataWorke")
    assert f"now {CONFIG.training.data_workers}" in advice


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([step(number, 0.1) for number in range(1, 80)], id="a tenth"),
        pytest.param([step(number, 0.9) for number in range(1, 5)], id="too few steps"),
        pytest.param(
            [step(n, 0.9 if n in (1, 11) else 0.0, 1 + n // 11) for n in range(1, 21)], id="starts of attempts"
        ),
        pytest.param([], id="none"),
        pytest.param([step(number, 0.0) | {"step_seconds": 0.0} for number in range(1, 20)], id="no time"),
    ],
)
def test_no_advice_without_much_waiting(steps: list[dict[str, Any]]) -> None:
    assert data_advice(Record(config=CONFIG, steps=steps)) is None

"""A tracker never stops a stage: what happens when it is slow, gone, broken or not installed."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from internvl_api.spec import Tracking
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.errors import UserError
from internvl_trainer.tracking import __main__ as process
from internvl_trainer.tracking import tracker as tracker_module
from internvl_trainer.tracking.clients import check_client
from internvl_trainer.tracking.records import Metrics, Settings, Status, finite, parameters
from internvl_trainer.tracking.tracked_id import tracked_id
from internvl_trainer.tracking.tracker import ProcessTracker, tracking
from trainer.runs import make_config

MLFLOW = {"service": "mlflow", "url": "http://127.0.0.1:9"}
SETTINGS = Settings(
    tracking=Tracking.model_validate(MLFLOW), experiment="team", run_name="run", id="a" * 21, folder="/tmp"
)


class Recorder:
    """A client that remembers, and fails as often as it is told."""

    def __init__(self, failures: int = 0) -> None:
        self.failures, self.steps, self.status = failures, list[int](), ""

    def describe(self, parameters: Mapping[str, str], tags: Mapping[str, str]) -> None: ...

    def add(self, metrics: Sequence[Metrics]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route to the server\nand more")
        self.steps += [each.step for each in metrics]

    def conclude(self, scores: Mapping[str, float], addresses: Mapping[str, str]) -> None: ...

    def close(self, status: Status) -> None:
        self.status = status


def lines(*records: dict[str, object]) -> io.StringIO:
    return io.StringIO("\n".join(json.dumps(each) for each in (SETTINGS.to_dict(), *records)) + "\n")


def step(number: int) -> dict[str, object]:
    return {"kind": "metrics", "step": number, "at": 0, "values": {"train/loss": 1.0}}


def test_records_arrive_in_their_order() -> None:
    client, told = Recorder(), list[str]()
    end = {"kind": "end", "status": "finished"}
    assert process.run(lines(step(1), step(2), end), told.append, lambda _: client) == 0
    assert (client.steps, client.status, told) == ([1, 2], "finished", [])


def test_what_a_tracker_refuses_is_sent_again() -> None:
    client, told = Recorder(failures=1), list[str]()
    sender = process.Sender(SETTINGS, told.append, lambda _: client)
    sender.take(step(1))
    assert not sender.send()
    sender.take(step(2))
    assert not sender.send()  # not before some time has passed
    assert sender.send(last=True)
    assert client.steps == [1, 2]
    assert told == ["ConnectionError: no route to the server"]


def test_a_tracker_that_takes_nothing_ends_with_a_problem() -> None:
    told = list[str]()
    assert process.run(lines(step(1)), told.append, lambda _: Recorder(failures=9)) == 1
    assert told


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        pytest.param("import time; time.sleep(600)", "no answer within 0 s at the end of the stage", id="silent"),
        pytest.param("print('Gone: x', flush=True); import sys; sys.stdin.read()", "Gone: x", id="tells a problem"),
        pytest.param("raise SystemExit", "the reporting process has ended", id="dies"),
    ],
)
def test_a_stage_ends_whatever_the_reporting_process_does(
    body: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "_END_SECONDS", 0.2 if "sleep" in body else 60.0)
    told = list[str]()
    tracker = ProcessTracker(SETTINGS, told.append, [sys.executable, "-c", body])
    if "SystemExit" in body:
        tracker._child.wait()
    for number in range(5):
        tracker.metrics(number, {"train/loss": 1.0})
    tracker.close("finished")
    assert told == [problem]
    assert tracker._child.poll() is not None


def test_reports_are_dropped_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "_QUEUED", 10)
    monkeypatch.setattr(tracker_module, "_STOP_SECONDS", 0.2)
    told = list[str]()
    tracker = ProcessTracker(SETTINGS, told.append, [sys.executable, "-c", "import time; time.sleep(600)"])
    for number in range(5000):
        tracker.metrics(number, {f"train/{'x' * 150}": 1.0})
    assert tracker._queue.qsize() <= 10
    assert told == ["reports come faster than they are sent; some are left out"]
    tracker.close("failed")


def test_a_run_without_a_tracker_and_other_ranks_start_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("started")

    monkeypatch.setattr(tracker_module, "ProcessTracker", refuse)
    storage = open_storage(str(tmp_path), field="spec.output")
    tracked = make_config(str(tmp_path), tracking=MLFLOW)
    cases = [(make_config(str(tmp_path)), "train", True), (tracked, "train", False), (tracked, "preflight", True)]
    for config, stage, leads in cases:
        with tracking(config, stage, storage, print, leads=leads) as tracker:  # type: ignore[arg-type]
            tracker.metrics(1, {"train/loss": 1.0})


def test_a_problem_shows_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token whose Secret ends with a line break, as HTTP's client quotes it."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "planted-token\n")
    told = list[str]()

    def broken(_settings: Settings, tell: Callable[[str], None]) -> ProcessTracker:
        tell(f"InvalidHeader: {b'Bearer planted-token' + bytes([10])!r}")
        raise OSError("no process")

    monkeypatch.setattr(tracker_module, "ProcessTracker", broken)
    storage = open_storage(str(tmp_path), field="spec.output")
    with tracking(make_config(str(tmp_path), tracking=MLFLOW), "train", storage, told.append, leads=True):
        pass
    assert "InvalidHeader" in told[0]
    assert "planted" not in "".join(told)


def test_preflight_names_the_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(str(tmp_path), tracking=MLFLOW)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"EXTRAS=mlflow.*internvl-trainer\[mlflow\]") as caught:
        check_client(config)
    assert (caught.value.reason, caught.value.where) == ("TrackerMissing", "spec.tracking.service")
    check_client(make_config(str(tmp_path)))


def test_every_attempt_and_stage_finds_the_same_id(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path), field="spec.output")
    config = make_config(str(tmp_path), tracking=MLFLOW)
    first = tracked_id(config, storage, print)
    assert len(first) == 21
    assert tracked_id(config, storage, print) == first
    other = make_config(str(tmp_path), tracking=MLFLOW, training={"learningRate": 0.5})
    assert tracked_id(other, storage, print) != first
    storage.write("tracking/run.json", b"[]")
    assert tracked_id(config, storage, print) != first


def test_parameters_show_no_secret_and_figures_are_finite(tmp_path: Path) -> None:
    signed = "https://data.example/pets.jsonl?X-Amz-Signature=planted"
    config = make_config(str(tmp_path), data={"train": {"pets": {"annotation": signed}}})
    found = parameters(config)
    assert found["data.train.pets.annotation"] == "https://data.example/pets.jsonl?…"
    assert found["training.globalBatchSize"] == "4"
    assert "lora.languageRank" not in found
    assert finite({"a": 1, "b": None, "c": float("inf"), "d=é": 2}) == {"a": 1.0, "d__": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize(("service", "name"), [("wandb", ".wandb"), ("swanlab", "backup.swanlab")])
def test_offline_leaves_the_clients_files_in_the_output(service: str, name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(service) is None:
        pytest.skip(f"{service} is not installed: its package conflicts with the virtualenv's")
    config = make_config(str(tmp_path / "out"), tracking={"service": service, "offline": True})
    storage, told = open_storage(config.output, field="spec.output"), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker_module, "_END_SECONDS", 120.0)
        with tracking(config, "train", storage, told.append, leads=True) as tracker:
            tracker.metrics(1, {"train/loss": 0.75})
    assert told == []
    (path,) = [each.key for each in storage.list("tracking/") if each.key.endswith(name)]
    assert b"train/loss" in storage.read(path)

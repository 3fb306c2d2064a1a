"""Reports against a real MLflow server, through the reporting process that a stage starts."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from internvl_api.run_config import RunConfig
from internvl_api.status import EvaluationStatus, StageName, StageResult
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.distributed import free_port
from internvl_trainer.tracking.tracker import Tracker, tracking
from trainer.runs import make_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, str(Path(__file__).with_name("mlflow_server.py")), str(folder / "store.db"), str(port)]
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 300
            while not _is_ready(url):
                said = (folder / "log").read_text()[-2000:]
                assert process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.2)
            yield url
        finally:
            process.kill()


def _is_ready(url: str) -> bool:
    try:
        # The first request of this kind makes the database's tables.
        body = b'{"max_results": 1}'
        request = urllib.request.Request(f"{url}/api/2.0/mlflow/experiments/search", body, method="POST")
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def ask(url: str, path: str, **body: Any) -> Any:
    answer = requests.post(f"{url}/api/2.0/mlflow/{path}", json=body, timeout=60)
    answer.raise_for_status()
    return answer.json()


def found(url: str, experiment: str) -> list[dict[str, Any]]:
    named = requests.get(
        f"{url}/api/2.0/mlflow/experiments/get-by-name", params={"experiment_name": experiment}, timeout=60
    ).json()
    return ask(url, "runs/search", experiment_ids=[named["experiment"]["experiment_id"]]).get("runs", [])


def curve(url: str, run: str, name: str) -> list[tuple[int, float]]:
    params = {"run_id": run, "metric_key": name}
    answer = requests.get(f"{url}/api/2.0/mlflow/metrics/get-history", params=params, timeout=60).json()
    return [(int(point.get("step", 0)), point["value"]) for point in answer["metrics"]]


def values(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {each["key"]: each["value"] for each in entries}


def report(config: RunConfig, stage: StageName, say: Any) -> list[str]:
    """Let `say` use the tracker of a stage; the problems that were told."""
    problems: list[str] = []
    storage = open_storage(config.output, field="spec.output")
    with tracking(config, stage, storage, problems.append, leads=True) as tracker:
        say(tracker)
    return problems


def test_params_curves_scores_and_addresses_are_of_one_run(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(str(tmp_path / "out"), tracking={"service": "mlflow", "url": server})

    def first(tracker: Tracker) -> None:
        for step in (1, 2, 3):
            tracker.metrics(step, {"train/loss": 4.0 - step, "train/learning_rate": 0.1, "train/nan": float("nan")})
        tracker.metrics(3, {"validation/loss": 0.5})
        tracker.result(StageResult(stage="train", outcome="resume", reason="Stopped"))

    def second(tracker: Tracker) -> None:  # from the checkpoint of step 2
        for step in (3, 4):
            tracker.metrics(step, {"train/loss": 4.0 - step})
        tracker.result(
            StageResult(stage="train", outcome="succeeded", reason="Trained", artifacts={"model": "s3://b/m"})
        )

    def third(tracker: Tracker) -> None:
        figures = EvaluationStatus(baseline={"coco": {"CIDEr": 0.5}}, final={"coco": {"CIDEr": 1.25}})
        tracker.result(StageResult(stage="publish", outcome="succeeded", reason="Published", evaluation=figures))

    monkeypatch.setattr("internvl_trainer.tracking.tracker._STOP_SECONDS", 120.0)
    monkeypatch.setattr("internvl_trainer.tracking.tracker._END_SECONDS", 120.0)
    monkeypatch.setenv("INTERNVL_ATTEMPT", "1")
    assert report(config, "train", first) == []
    assert [run["info"]["status"] for run in found(server, "team")] == ["RUNNING"]
    monkeypatch.setenv("INTERNVL_ATTEMPT", "2")
    assert report(config, "train", second) == []
    assert report(config, "publish", third) == []

    (run,) = found(server, "team")
    assert (run["info"]["run_name"], run["info"]["status"]) == ("run", "FINISHED")
    assert curve(server, run["info"]["run_id"], "train/loss") == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.0)]
    assert curve(server, run["info"]["run_id"], "validation/loss") == [(3, 0.5)]
    params, tags, metrics = (values(run["data"][part]) for part in ("params", "tags", "metrics"))
    assert params["training.learningRate"] == "0.003"
    assert params["method"] == "full"
    assert (tags["internvl.run"], tags["internvl.attempt"]) == ("team/run", "2")
    assert tags["artifact.model"] == "s3://b/m"
    assert metrics["evaluation/final/coco/CIDEr"] == 1.25
    assert "train/nan" not in metrics


def test_names_of_the_spec_are_used(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internvl_trainer.tracking.tracker._END_SECONDS", 120.0)
    named = {"service": "mlflow", "url": server, "experiment": "pets/lora", "runName": "lr-3"}
    config = make_config(str(tmp_path / "out"), tracking=named)
    assert report(config, "evaluate", lambda tracker: tracker.metrics(1, {"train/loss": 1.0})) == []
    assert [run["info"]["run_name"] for run in found(server, "pets/lora")] == ["lr-3"]

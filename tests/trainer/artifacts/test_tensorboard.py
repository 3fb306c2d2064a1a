"""`internvl-trainer tensorboard`: the real TensorBoard over the events that a run has stored so far."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from internvl_api.constants import ExitCode
from internvl_trainer.__main__ import main
from internvl_trainer.artifacts.manifest import commit, upload_files
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.cli import tensorboard as tensorboard_command
from internvl_trainer.cli.tensorboard import newest_events, put
from internvl_trainer.distributed import free_port
from internvl_trainer.stage_store import StageStore
from internvl_trainer.train.metrics_log import MetricsLog, StepRecord
from ivft_cluster.shell import wait_for
from trainer.runs import environment, make_config, write_config


def record(log: MetricsLog, steps: range) -> None:
    for step in steps:
        log.record(StepRecord(step, 0.1, 3.0 - step / 10, 1e-5, 1.0, 10, 20, 20, 4, 1.0, 0.0, 1))


def checkpoint(storage: Storage, log: MetricsLog, step: int) -> None:
    """What a checkpoint has of the metrics log."""
    folder = f"checkpoints/step-{step:08d}"
    files = upload_files(storage, folder, {f"journal/{name}": path for name, path in log.files().items()})
    commit(storage, folder, files, "print", step=step)


def answer(port: int, path: str) -> Any:
    """Of TensorBoard, or an exception while it does not listen."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/scalars/{path}", timeout=5) as found:
        return json.load(found)


@pytest.mark.slow
def test_the_curve_grows_while_the_run_trains(storage: Storage, tmp_path: Path) -> None:
    config = make_config(storage.uri)
    StageStore(config, storage).claim_output()
    log = MetricsLog(tmp_path / "journal")
    record(log, range(1, 4))
    checkpoint(storage, log, 3)
    port = free_port()
    command = [sys.executable, "-m", "internvl_trainer", "tensorboard", "--port", str(port)]
    command += ["--config", str(write_config(config, tmp_path))]
    process = subprocess.Popen(
        command,
        env=environment(tmp_path),
        stderr=subprocess.DEVNULL,
        # Who runs the tests in the background of a shell has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def losses() -> list[float]:
        return [round(value, 3) for _, _, value in answer(port, "scalars?run=.&tag=train%2Floss")]

    try:
        wait_for("the first steps are shown", lambda: losses() == [2.9, 2.8, 2.7], timeout=180)
        record(log, range(4, 6))
        checkpoint(storage, log, 5)
        wait_for("the next steps are shown", lambda: losses() == [2.9, 2.8, 2.7, 2.6, 2.5], timeout=180)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == ExitCode.OK
    finally:
        process.kill()
        process.wait()
        log.close()


def test_the_newest_events_of_an_output(storage: Storage) -> None:
    assert newest_events(storage) == ""
    StageStore(make_config(storage.uri), storage).claim_output()
    assert newest_events(storage) == "stages/train/tensorboard"
    for step in (5, 10):
        commit(storage, f"checkpoints/step-{step:08d}", [], "print")
    storage.write("checkpoints/step-00000015/journal/tensorboard/x", b"of a checkpoint without a manifest")
    assert newest_events(storage) == "checkpoints/step-00000010/journal/tensorboard"
    commit(storage, "stages/train", [], "print")
    assert newest_events(storage) == "stages/train/tensorboard"
    commit(storage, "artifacts", [], "print")
    assert newest_events(storage) == "artifacts/tensorboard"


@pytest.mark.parametrize(
    ("new", "same"),
    [pytest.param(b"12345", True, id="longer"), pytest.param(b"other", False, id="another")],
)
def test_a_file_that_only_grew_stays_the_one_that_is_open(tmp_path: Path, new: bytes, same: bool) -> None:
    path, arrived = tmp_path / "events", tmp_path / "arrived"
    path.write_bytes(b"123")
    arrived.write_bytes(new)
    with path.open("rb") as reader:
        reader.read()
        put(arrived, path)
        assert reader.read() == (b"45" if same else b"")
    assert path.read_bytes() == new


def tensorboard(*words: str | Path) -> int:
    return main(["tensorboard", "--port", str(free_port()), *map(str, words)])


def test_nothing_to_show_is_said(storage: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (storage.uri, str(tmp_path)):
        assert tensorboard("--logdir", place) == ExitCode.USER_ERROR
        expected = f"NotFound: --logdir: found no TensorBoard events under {place}; check the "
        assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize(("words", "host"), [((), "localhost"), (("--host", "0.0.0.0"), "0.0.0.0")])
def test_tensorboard_listens_where_it_is_told(
    words: tuple[str, ...], host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "events.tfevents.1").touch()
    shown: list[str] = []
    monkeypatch.setattr(tensorboard_command, "_show", lambda _folder, host, *_: shown.append(host) or 0)
    assert tensorboard("--logdir", tmp_path, *words) == ExitCode.OK
    assert shown == [host]


def test_a_run_yaml_that_is_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tensorboard("--config", tmp_path / "run.yaml") == ExitCode.CONFIG
    assert "run.yaml cannot be used" in capsys.readouterr().err


def test_what_to_install_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    assert tensorboard("--logdir", "s3://bucket/run") == ExitCode.USER_ERROR
    assert "pip install 'tensorboard>=2.19'" in capsys.readouterr().err

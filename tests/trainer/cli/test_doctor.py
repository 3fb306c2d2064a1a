"""`internvl-trainer doctor` as a person and a program read it."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from internvl_api.constants import ExitCode
from internvl_trainer.artifacts.storage import FolderStorage
from internvl_trainer.cli import doctor
from internvl_trainer.cli.doctor import as_json, print_rows
from internvl_trainer.cli.main import main
from internvl_trainer.doctor import bandwidth
from internvl_trainer.doctor.checks import Row
from rich.console import Console

ROWS = [
    Row("pytorch", "pass", "2.13.0, CUDA 13.0, uses 8 GPUs"),
    Row("attention: varlen", "failure", "differs from math by 5.0e-01", "the GPU or the build computes wrongly"),
    Row("disk", "warning", "/scratch: 20.0 GiB free\x1b[2J", "little room: checkpoints pass through it"),
    Row("storage", "skipped", "not measured", "name it: --storage s3://bucket"),
]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_shows_each_row_with_its_next_step(width: int) -> None:
    output = io.StringIO()
    print_rows(ROWS, Console(file=output, width=width))
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    assert lines == [
        "✓  pytorch            2.13.0, CUDA 13.0, uses 8 GPUs",
        "✗  attention: varlen  differs from math by 5.0e-01",
        "                      the GPU or the build computes wrongly",
        "!  disk               /scratch: 20.0 GiB free\\x1b[2J",
        "                      little room: checkpoints pass through it",
        "-  storage            not measured",
        "                      name it: --storage s3://bucket",
        "1 failed, 1 warned, 1 passed, 1 skipped",
    ]


def test_json_has_the_worst_level_and_every_row() -> None:
    document = json.loads(as_json(ROWS))
    assert document["result"] == "failure"
    assert document["checks"][0] == {
        "name": "pytorch",
        "level": "pass",
        "found": "2.13.0, CUDA 13.0, uses 8 GPUs",
        "advice": "",
    }
    assert json.loads(as_json(ROWS[2:]))["result"] == "warning"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--expect", "gpus=64"], "--expect"),
        (["--storage", "s3://nowhere"], "--storage"),
        (["--size", "4"], "--size"),
        (["--expect", "gpus=64", "--storage", "s3://nowhere", "--output", "json"], "--expect, --storage, --output"),
    ],
)
def test_options_that_the_stage_does_not_take_are_refused_beside_config(
    given: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--config", "run.yaml", *given]) == ExitCode.USER_ERROR
    message = capsys.readouterr().err
    assert message.startswith(f"found {named} beside --config")
    assert f"drop {named}, or drop --config" in message


def test_a_size_that_would_fill_the_disk_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "measure", lambda **_: pytest.fail("measured"))
    assert main(["doctor", "--size", "99999999999"]) == ExitCode.USER_ERROR
    message = capsys.readouterr().err
    assert re.match(
        r"--size: found a test file of 99999999999 MiB, expected at most \d+ MiB: half of the [\d.]+ GiB", message
    )
    assert "give a smaller --size, or set TMPDIR" in message


def test_a_stop_leaves_nothing_in_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = []

    def stopped(storage: FolderStorage, key: str, _megabytes: int) -> None:
        storage.write(key, b"x")
        sent.append(key)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(bandwidth, "measure_speed", stopped)
    monkeypatch.setattr(doctor, "prepare_environment", lambda *_: None)
    monkeypatch.setattr(doctor, "measure", lambda storage, megabytes: bandwidth.measure_storage(storage, megabytes))
    assert main(["doctor", "--storage", str(tmp_path), "--size", "1"]) == ExitCode.RESUME
    assert "stopped by SIGTERM; nothing is left" in capsys.readouterr().err
    assert len(sent) == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_doctor_on_this_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "internvl_trainer", "doctor", "--output", "json", "--size", "4"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    asked = [*command, "--storage", str(tmp_path), "--expect", "gpus=8"]
    done = subprocess.run(asked, capture_output=True, text=True, env=environment)
    assert done.returncode == 65, done.stderr
    checks = {each["name"]: each for each in json.loads(done.stdout)["checks"]}
    assert checks["storage"]["level"] in ("pass", "warning")
    assert checks["clock"]["level"] == "pass"
    assert checks["attention: sdpa flash"]["level"] == "pass"
    assert "2 processes (gloo)" in checks["all-reduce"]["found"]
    assert (checks["GPUs"]["level"], checks["GPUs"]["advice"][:10]) == ("failure", "expected 8")

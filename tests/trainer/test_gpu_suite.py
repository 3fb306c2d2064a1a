"""The suite that measures a card, on the processor and with tiny models."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import CASES
from gpu import __main__ as command
from gpu.answers import measure_answers
from gpu.card import count_waits, peak_flops
from gpu.exactness import measure_golden, measure_kernels, measure_zero
from gpu.models import TINY
from gpu.results import BEGIN, END, Result, write_page
from gpu.steps import Work, count_flops
from gpu.suite import PARTS, WORKS, Part
from gpu.upstream import measure_against_upstream
from internvl_api.memory.estimate import memory
from internvl_api.memory.setup import Row
from internvl_api.memory.step_time import row_flops
from ivft_cluster.paths import CHECKOUT
from trainer.runs import environment

CPU = torch.device("cpu")
WORK = Work(TINY.name, rows=4, micro_batch=2, most_tiles=3, most_text=64, steps=1)


def test_kernels_that_need_a_card_say_so() -> None:
    figures = measure_kernels(CPU, lengths=(1, 9))
    assert all(0 < value < 2e-2 for name, value in figures.items() if name.startswith("rows_sdpa"))
    others = [value for name, value in figures.items() if not name.startswith("rows_sdpa")]
    assert others
    assert all(isinstance(value, str) for value in others)


def test_a_read_of_the_device_is_counted() -> None:
    tensor = torch.ones(3)
    assert count_waits(lambda: tensor + 1, CPU) == 0
    assert count_waits(lambda: [float(tensor.sum()), float(tensor[0])], CPU) == 2


def test_only_known_cards_have_a_stated_peak() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("cpu") is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_counted_operations_are_those_of_the_estimate(method: str) -> None:
    """A real width, on tensors without data; the estimate leaves out attention's products."""
    work = Work("InternVL3-2B", method, layers=4, rows=2, micro_batch=1, most_tiles=2)
    setup = work.setup()
    assert setup is not None
    setup = replace(setup, gradient_checkpointing=False)
    rows = [Row(each.length, len(each.tiles), int((each.labels != -100).sum())) for each in work.samples()]
    estimated = sum(row_flops(setup, row) for row in rows)
    assert 1.0 < count_flops(work) / estimated < 1.3


@pytest.mark.slow
def test_golden_losses() -> None:
    rounded, exact = measure_golden(CPU), measure_golden(CPU, torch.float32)
    assert list(rounded) == list(exact) == CASES
    assert min(rounded.values()) > 0
    assert max(rounded.values()) < 1e-3, rounded
    assert max(exact.values()) < 1e-5, exact


@pytest.mark.slow
def test_both_ways_and_answers() -> None:
    figures = measure_against_upstream(WORK, CPU)
    assert figures["ratio of tokens a second"] == pytest.approx(
        figures["tokens a second, here"] / figures["tokens a second, upstream's way"]  # type: ignore[operator]
    )
    answers = measure_answers(TINY.name, CPU, batches=(1, 2), tiles=1, text=4, new=3)
    assert [name for name in answers if "memory" not in name] == [
        "tokens a second, batch of 1", "tokens a second, batch of 2",
    ]  # fmt: skip
    assert min(answers.values()) > 0


_TRAIN = """
import json, sys
from internvl_trainer.distributed import Rendezvous, join_group, prepare_environment
prepare_environment("cpu", 1)
group = join_group(Rendezvous.from_environment({}), "cpu")
from gpu.steps import Work, measure_checkpoint, measure_steps
work = Work(**json.loads(sys.argv[1]))
print(json.dumps([measure_steps(work, group), measure_checkpoint(work, group)]))
"""


@pytest.mark.slow
def test_steps_and_a_checkpoint(tmp_path: Path) -> None:
    folders = [str(CHECKOUT / "tests"), str(CHECKOUT / "tests/cluster"), *sys.path]
    env = environment(tmp_path, PYTHONPATH=":".join(folders))
    work = json.dumps({**vars(WORK), "method": "full"})
    done = subprocess.run([sys.executable, "-c", _TRAIN, work], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    steps, checkpoint = json.loads(done.stdout.strip().splitlines()[-1])
    assert steps["tokens a step"] == sum(row.length for row in WORK.samples())
    assert steps["tokens a second"] == pytest.approx(steps["tokens a step"] / steps["seconds a step"])
    assert steps["loss after"] < steps["loss before"]
    assert steps["host waits a step"] >= 1
    assert "peak memory, GB" not in steps, "there is no card"
    assert "MFU, %" not in steps
    assert 0 < checkpoint["later stall, s"] < checkpoint["stored after, s"]
    # fp32 weights and two moments of what learns
    assert checkpoint["checkpoint, GB"] * 1e9 == pytest.approx(12 * steps["trained parameters"], rel=0.1)


@pytest.mark.slow
def test_zero_stages(tmp_path: Path) -> None:
    figures = measure_zero(CPU, tmp_path, worlds=(1,))
    assert list(figures) == ["ZeRO-1, 1 process", "ZeRO-2, 1 process", "ZeRO-3, 1 process"]
    assert max(figures.values()) < 1e-5


# --- the command ---


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that the command has measured; `b` fails."""
    names: list[str] = []

    def run(name: str, card: str, limit: int) -> Result:
        names.append(name)
        return Result(name, card, 1.0, {"x": 1.0}, "out of memory" if name == "b" else "")

    def part(limit: int) -> Part:
        return Part("A part", limit, dict)

    monkeypatch.setattr(command, "PARTS", {"a": part(60), "b": part(60), "c": part(500)})
    monkeypatch.setattr(command, "run_part", run)
    return names


def test_a_call_goes_on_where_the_last_one_ended(measured: list[str], tmp_path: Path) -> None:
    assert command.run_parts(command.waiting(tmp_path), tmp_path, "Card", 400) == ["b", "c"], "b failed; c is too long"
    assert measured == ["a", "b"]
    assert command.waiting(tmp_path) == ["c"]
    assert command.run_parts(command.waiting(tmp_path), tmp_path, "Card", 400) == [], "a first part always runs"
    assert command.waiting(tmp_path) == ["b"], "what failed is tried again at the end"


def run_command(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> int:
    """The command as on a machine with a card; its page and results are in `folder`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "prepare_environment", lambda *_: None)
    monkeypatch.setattr(command, "ask_card", lambda: "Card")
    monkeypatch.setattr(command, "CHECKOUT", folder)
    monkeypatch.setattr(command, "PAGE", folder / "gpu.md")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu", "--seconds", "400", *words])
    command.PAGE.write_text(f"{BEGIN}\n{END}\n")
    return command.main()


def test_a_failed_part_is_left_and_fails_the_command(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, tmp_path) == command.UNFINISHED
    assert "not measured: b, c; run it again" in capsys.readouterr().out
    assert run_command(monkeypatch, tmp_path) == command.UNFINISHED
    assert "not measured: b; run it again" in capsys.readouterr().out, "c is measured, and b failed before"
    assert measured == ["a", "b", "c"]
    assert run_command(monkeypatch, tmp_path, "b") == command.UNFINISHED
    assert "not measured: b; run it again" in capsys.readouterr().out
    assert run_command(monkeypatch, tmp_path, "a") == 0
    assert "measured: a; see " in capsys.readouterr().out


CHILD = """
import signal, sys
with open(sys.argv[1], "w") as pipe:
    pipe.write("x")
    pipe.flush()
    signal.pause()
"""
PARENT = """
import signal, subprocess, sys
subprocess.Popen([sys.executable, *sys.argv[2:]])
if sys.argv[1] == "ends":
    open(sys.argv[-1]).read(1)
else:
    signal.pause()
"""


@pytest.mark.parametrize("ends", [True, False])
def test_no_process_of_a_part_outlives_it(ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child holds a pipe open; the pipe's end comes when the child is gone."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "child.py").write_text(CHILD)
    words = [sys.executable, "-c", PARENT, "ends" if ends else "stays", str(tmp_path / "child.py"), str(pipe)]
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    wait = subprocess.Popen.wait

    def wait_for_the_child(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout and not ends:
            assert select.select([reading], [], [], 60)[0]
            assert os.read(reading, 1) == b"x"
            raise subprocess.TimeoutExpired(words, timeout)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_the_child)
    assert command.run_alone(words, 60) == ("" if ends else "not done after 60 s")
    assert select.select([reading], [], [], 60)[0]
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_the_last_line_of_a_failed_part_is_its_failure() -> None:
    assert command.run_alone([sys.executable, "-c", "raise ValueError('no room')"], 60) == "ValueError: no room"
    assert command.run_alone([sys.executable, "-c", "raise SystemExit(7)"], 60) == "exit code 7"


def test_the_page_has_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text(f"# Title\n\n{BEGIN}\n\nNothing.\n\n{END}\n\n## After\n")
    figures: dict[str, Any] = {"tokens a second": 12345.6, "error, %": -3.14159, "attention": "rows_varlen"}
    Result("a", "Card X", 2.0, figures).write(tmp_path / "a.json")
    Result("b", "Card X", 2.0, {}, "out of memory").write(tmp_path / "b.json")
    write_page(page, tmp_path, {"a": "First", "b": "Second", "c": "Third"})
    text = page.read_text()
    assert "Measured on Card X with" in text
    assert "### First\n\n| figure | value |\n| --- | --- |\n| tokens a second | 12,346 |\n| error, % | -3.14 |" in text
    assert "### Second\n\nNot measured: out of memory" in text
    assert "Third" not in text
    assert "Nothing." not in text
    assert text.endswith(f"{END}\n\n## After\n")
    write_page(page, tmp_path, {"a": "First", "b": "Second"})
    assert page.read_text() == text


def test_the_suite_fits_into_half_an_hour_in_calls_of_nine_minutes() -> None:
    assert max(part.limit for part in PARTS.values()) <= 540
    assert sum(part.limit for part in PARTS.values()) <= 1800


@pytest.mark.parametrize("name", WORKS)
def test_what_is_trained_fits_on_a_card_of_80_gb(name: str) -> None:
    """By the estimate, with an eighth to spare for its error."""
    setup = WORKS[name].setup()
    assert setup is not None
    assert 4e9 < memory(setup, WORKS[name].longest()).total < 70e9


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_a_card_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    before = command.PAGE.read_text()
    assert command.main() == 1
    assert "found no GPU" in capsys.readouterr().err
    assert command.PAGE.read_text() == before

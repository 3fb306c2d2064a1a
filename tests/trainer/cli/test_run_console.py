"""The console of `internvl-trainer run` at two widths: the stages' lines, the figures, and what a stop says."""

from __future__ import annotations

import io
import signal
import socket
import threading
from pathlib import Path

import pytest
from internvl_api.constants import TAKING_STEPS
from internvl_api.status import EvaluationStatus, Progress, StageName, StageResult
from internvl_trainer.cli.display import Display
from internvl_trainer.cli.figures_table import figures_of_results, figures_table
from internvl_trainer.cli.interrupt import answered, stop_notice
from internvl_trainer.cli.stage_line import StageLine, render, time_left
from internvl_trainer.signals import handled
from rich.console import Console
from trainer.runs import make_config

RECORDINGS = Path(__file__).parent / "recordings"
WIDTHS = [80, 120]
STAGES: tuple[StageName, ...] = ("preflight", "baseline-evaluate", "train", "evaluate", "merge", "publish")
FIGURES = EvaluationStatus(
    baseline={"coco": {"BLEU_4": 0.214, "CIDEr": 0.793}}, final={"coco": {"BLEU_4": 0.385, "CIDEr": 1.312}}
)


def result(stage: StageName, reason: str, outcome: str = "succeeded", **fields: object) -> StageResult:
    return StageResult.model_validate({"stage": stage, "reason": reason, "outcome": outcome, **fields})


def a_run(width: int) -> str:
    """What a run of six stages leaves on a terminal, and how its lines look while it trains and scores."""
    now = 0.0
    console = Console(width=width, file=io.StringIO(), force_terminal=False, legacy_windows=False)
    display = Display(console, STAGES, clock=lambda: now)

    def show(title: str) -> None:
        console.print(f"--- {title}", highlight=False)
        console.print(display.rendered())

    with display.follow("preflight", lambda: None):
        now = 20
    display.finish("preflight", result("preflight", "Checked", message="566747 rows an epoch, in 1 datasets"))
    with display.follow("baseline-evaluate", lambda: None):
        line = display._lines["baseline-evaluate"]
        line.note(Progress(detail="answering coco", step=5000, total_steps=5000, eta_seconds=0.0))
        line.note(Progress(detail="storing the answers", step=5000, total_steps=5000, eta_seconds=0.0))
        now = 620
        show("scoring: all rows are answered, and the clock runs")
    display.finish("baseline-evaluate", result("baseline-evaluate", "Evaluated", message="coco: CIDEr 0.793"))
    with display.follow("train", lambda: None):
        line = display._lines["train"]
        line.note(
            Progress(
                detail=TAKING_STEPS, step=400, total_steps=1106, loss=1.2345678, validation_loss=1.3, eta_seconds=8640
            )
        )
        now = 5420
        show("training")
    display.finish("train", result("train", "Trained", message="1106 steps", progress=Progress(step=1106, loss=1.1)))
    with display.follow("evaluate", lambda: None):
        display._lines["evaluate"].note(Progress(detail="answering coco", step=32, total_steps=5000, eta_seconds=75))
        now = 5430
    stopped = result("evaluate", "Stopped", "resume", message="stopped by SIGTERM; start me again")
    display.finish("evaluate", stopped)
    show("stopped")
    table = figures_table(FIGURES)
    assert table is not None
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


@pytest.mark.parametrize("width", WIDTHS)
def test_the_console_is_as_recorded(width: int) -> None:
    shown = a_run(width)
    assert shown == (RECORDINGS / f"run-{width}.txt").read_text(encoding="utf-8")
    assert max(map(len, shown.splitlines())) <= width


def test_a_finished_stage_keeps_steps_loss_and_time() -> None:
    line = StageLine("train", began=0.0)
    line.note(Progress(step=9, total_steps=10, loss=0.5))
    line.note(Progress(step=10, total_steps=10))
    line.ended, line.result = 65.0, result("train", "Trained")
    assert render(line, 80, 1000.0).plain.split() == ["✓", "train", "10/10", "loss", "0.5000", "Trained", "0:01:05"]


def test_the_clock_runs_after_the_last_row_and_no_time_is_left() -> None:
    line = StageLine("evaluate", began=0.0)
    line.note(Progress(detail="scoring", step=5, total_steps=5, eta_seconds=0.0))
    first, later = (render(line, 80, now).plain for now in (10.0, 75.0))
    assert first.endswith("0:00:10")
    assert later.endswith("0:01:15")
    assert "left" not in later


@pytest.mark.parametrize("width", [20, 40, *WIDTHS])
def test_a_line_is_never_wider_than_the_terminal(width: int) -> None:
    line = StageLine("baseline-evaluate", began=0.0)
    line.note(Progress(detail="a long\nstory " * 50, step=1, total_steps=123456, loss=1.0, eta_seconds=1e6))
    assert len(render(line, max(width, 30), 1e5).plain) <= max(width, 30)
    assert "\n" not in render(line, width, 1e5).plain


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s left"), (89, "89 s left"), (90, "2 min left"), (3600, "60 min left"), (12000, "3 h 20 min left")],
)
def test_time_left_is_in_the_unit_of_a_person(seconds: float, said: str) -> None:
    assert time_left(seconds) == said


def test_figures_of_all_stages_are_one_table() -> None:
    results = [
        result("baseline-evaluate", "Evaluated", evaluation=EvaluationStatus(baseline={"ask": {"exact_match": 0.5}})),
        result("train", "Trained"),
        result("evaluate", "Evaluated", evaluation=EvaluationStatus(final={"ask": {"exact_match": 0.25}})),
    ]
    table = figures_table(figures_of_results(results))
    assert table is not None
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    assert "ask exact_match 0.5000 0.2500 -0.2500" in " ".join(console.file.getvalue().split())
    assert figures_table(figures_of_results([result("train", "Trained")])) is None


@pytest.mark.parametrize(
    ("stage", "takes_steps", "said"),
    [
        ("train", True, "saving a checkpoint, up to 120 s"),
        ("train", False, "saving a checkpoint if a step is done, up to 120 s"),
        ("evaluate", True, "the answers so far are stored"),
        ("merge", False, "this one starts again"),
        (None, False, "finished stages stay"),
    ],
)
def test_a_stop_says_what_it_does(stage: StageName | None, takes_steps: bool, said: str) -> None:
    assert said in stop_notice(make_config("/out"), stage, takes_steps=takes_steps)


def test_ctrl_c_is_answered_at_once_and_the_second_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    left = threading.Event()
    codes: list[int] = []
    spoken = threading.Semaphore(0)

    def say(text: str) -> None:
        said.append(text)
        spoken.release()

    def leave_process(code: int) -> None:
        codes.append(code)
        left.set()

    monkeypatch.setattr("internvl_trainer.cli.interrupt.os._exit", leave_process)
    with handled(lambda *_: None), answered(say, lambda: "saving a checkpoint, up to 120 s", lambda: None):
        signal.raise_signal(signal.SIGINT)
        assert spoken.acquire(timeout=30)
        assert said == ["saving a checkpoint, up to 120 s; Ctrl-C again to stop now"]
        signal.raise_signal(signal.SIGTERM)  # of a scheduler: no second Ctrl-C
        signal.raise_signal(signal.SIGINT)
        assert left.wait(30)
    assert codes == [130]
    assert len(said) == 2


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.0 200 OK\r\n\r\nhello", id="another program"),
        pytest.param(b"HTTP/1.0 200 OK\r\n\r\n[]", id="no object"),
        pytest.param(b'HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n{"step": 3}', id="the child ended meanwhile"),
        pytest.param(b"SSH-2.0-OpenSSH\r\n", id="no HTTP"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_what_is_no_report_of_progress_is_left_out(answer: bytes) -> None:
    from internvl_trainer.cli.run import _ask

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert _ask(server.getsockname()[1]) is None
        thread.join(60)

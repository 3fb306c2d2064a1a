"""The last word of a stage: exit code, reason, and a message without secrets."""

from __future__ import annotations

import errno
import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from internvl_api.constants import TERMINATION_MESSAGE_LIMIT, ExitCode
from internvl_api.publish_condition import ANSWER_METRICS, CAPTION_METRICS
from internvl_api.status import EvaluationStatus, StageResult
from internvl_trainer import signals
from internvl_trainer.errors import AccessDenied, LeaseLost, Unavailable, UserError
from internvl_trainer.exit_status import RedactingFormatter, conclude, report, termination_message
from internvl_trainer.signals import StopRequested, stop_by_exception

DONE = StageResult(stage="train", outcome="succeeded", reason="Trained", message="ok")
SECRET = "wJalrXUtnFEMI-not-a-real-key"


def raising(error: Exception) -> Callable[[], StageResult]:
    def work() -> StageResult:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "outcome", "reason"),
    [
        pytest.param(lambda: DONE, ExitCode.OK, "succeeded", "Trained", id="done"),
        pytest.param(
            lambda: DONE.model_copy(update={"outcome": "resume", "reason": "Stopped"}),
            ExitCode.RESUME,
            "resume",
            "Stopped",
            id="stopped with state",
        ),
        pytest.param(raising(StopRequested("SIGTERM")), ExitCode.RESUME, "resume", "Stopped", id="stopped without"),
        pytest.param(
            raising(UserError("ImageMissing", "no such image", "x.jsonl:3")),
            ExitCode.USER_ERROR,
            "failed",
            "ImageMissing",
            id="user's error",
        ),
        pytest.param(
            raising(AccessDenied("AccessDenied", "no")), ExitCode.ACCESS_DENIED, "failed", "AccessDenied", id="denied"
        ),
        pytest.param(
            raising(Unavailable("HubUnavailable", "no")), ExitCode.UNAVAILABLE, "failed", "HubUnavailable", id="away"
        ),
        pytest.param(
            raising(LeaseLost("OutputLeaseLost", "taken")), ExitCode.INTERNAL, "failed", "OutputLeaseLost", id="fenced"
        ),
        pytest.param(
            raising(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.1]:5")),
            ExitCode.INTERNAL,
            "failed",
            "PeerLost",
            id="peer gone",
        ),
        pytest.param(
            raising(RuntimeError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)")),
            ExitCode.INTERNAL,
            "failed",
            "PeerLost",
            id="peer hangs",
        ),
        pytest.param(
            raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
            ExitCode.INTERNAL,
            "failed",
            "GpuOutOfMemory",
            id="GPU memory full",
        ),
        pytest.param(
            raising(
                torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https")
            ),
            ExitCode.INTERNAL,
            "failed",
            "GpuOutOfMemory",
            id="GPU memory full outside of torch's allocator",
        ),
        pytest.param(
            raising(
                torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nSearch for `cudaErrorECC")
            ),
            ExitCode.INTERNAL,
            "failed",
            "GpuHardwareError",
            id="broken GPU",
        ),
        pytest.param(
            raising(OSError(errno.ENOSPC, "No space left on device", "/scratch/x")),
            ExitCode.INTERNAL,
            "failed",
            "DiskFull",
            id="disk full",
        ),
        pytest.param(raising(KeyError("x")), ExitCode.INTERNAL, "failed", "InternalError", id="our fault"),
    ],
)
def test_how_a_stage_ends(work: Callable[[], StageResult], code: int, outcome: str, reason: str) -> None:
    ended = conclude("train", work)
    assert (ended.code, ended.result.outcome, ended.result.reason) == (code, outcome, reason)


def test_a_message_says_where(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "termination-log"
    path.touch()
    monkeypatch.setenv("INTERNVL_TERMINATION_LOG", str(path))
    report(conclude("preflight", raising(UserError("ImageMissing", "no such image", "x.jsonl:3"))))
    assert capsys.readouterr().err == "preflight: ImageMissing: x.jsonl:3: no such image\n"
    assert json.loads(path.read_text()) == {
        "stage": "preflight",
        "outcome": "failed",
        "reason": "ImageMissing",
        "message": "x.jsonl:3: no such image",
        "artifacts": {},
    }


def test_outside_of_a_pod_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_TERMINATION_LOG", str(tmp_path / "absent"))
    report(conclude("train", lambda: DONE))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["x" * 10_000, "한" * 5000, '"\\\n' * 4000], ids=["ascii", "wide", "escaped"])
def test_a_termination_message_fits(text: str) -> None:
    data = termination_message(DONE.model_copy(update={"message": text}))
    assert len(data) <= TERMINATION_MESSAGE_LIMIT
    message = StageResult.model_validate_json(data).message
    assert message.endswith(" …")
    assert len(message) > 500


def test_figures_of_too_many_tasks_are_left_out_of_a_termination_message() -> None:
    figures = {
        f"task_{number}": {"CIDEr": number / 7, "METEOR": number / 11, "ROUGE_L": number / 13} for number in range(50)
    }
    many = DONE.model_copy(update={"evaluation": EvaluationStatus(final=figures)})
    few = DONE.model_copy(
        update={"evaluation": EvaluationStatus(final={"coco": figures["task_1"]}), "message": "x" * 9000}
    )
    data = termination_message(many)
    assert len(data) <= TERMINATION_MESSAGE_LIMIT
    assert StageResult.model_validate_json(data).evaluation is None
    kept = StageResult.model_validate_json(termination_message(few))
    assert kept.evaluation == few.evaluation
    assert len(kept.message) > 500


def test_figures_of_answers_give_way_to_the_tasks_own() -> None:
    own = {f"task_{number}": dict.fromkeys(CAPTION_METRICS, 1 / 3) for number in range(16)}
    both = {task: metrics | dict.fromkeys(ANSWER_METRICS, 0.1234) for task, metrics in own.items()}
    data = termination_message(
        DONE.model_copy(update={"evaluation": EvaluationStatus(final=both), "message": "x" * 99})
    )
    assert len(data) <= TERMINATION_MESSAGE_LIMIT
    assert StageResult.model_validate_json(data).evaluation == EvaluationStatus(final=own)


def test_secrets_are_in_no_message_and_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    ended = conclude("train", raising(RuntimeError(f"signed with {SECRET}")))
    assert SECRET not in termination_message(ended.result).decode()
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "failed with %s", (SECRET,), None)
    assert RedactingFormatter("%(message)s").format(record) == "failed with <AWS_SECRET_ACCESS_KEY>"


def test_a_repeated_signal_does_not_disturb_the_clean_up() -> None:
    cleaned = []

    def stopped_twice() -> None:
        try:
            with stop_by_exception():
                signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append("the lease")

    with pytest.raises(StopRequested), stop_by_exception():
        stopped_twice()
    assert cleaned == ["the lease"]
    with pytest.raises(StopRequested), stop_by_exception():
        signal.raise_signal(signal.SIGINT)


def test_a_later_signal_stops_again_what_swallowed_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_REPEATED_SECONDS", -1.0)
    with stop_by_exception():
        for _ in range(2):
            with pytest.raises(StopRequested):
                signal.raise_signal(signal.SIGTERM)

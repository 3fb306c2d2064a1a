"""What the command line says to a person: help, and a run.yaml or an option that cannot be used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from internvl_api.status import StageResult
from internvl_trainer.__main__ import main
from internvl_trainer.cli import run as single_machine
from internvl_trainer.cli.main import _COMMANDS
from internvl_trainer.errors import Rejected
from trainer.runs import make_config


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        pytest.param("evaluate", "Without captions, check publishIf: figures below", id="the stage of the answers"),
        pytest.param("score", "Score the captions of evaluate, and check publishIf", id="the stage of the captions"),
        pytest.param("publish", "to the Hugging Face Hub in one commit", id="publish says where it sends"),
        pytest.param("run", "the same command goes on where it was", id="run says what it does"),
        pytest.param("report", "index.html (open it in a browser)", id="report says what it writes"),
    ],
)
def test_help_says_what_a_command_does(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in help_of(command, capsys)


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_command_has_a_help_with_an_example_and_exit_codes(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(command, capsys)
    assert "example" in text
    assert re.search(r"[Ee]xit codes: ", text)


@pytest.mark.parametrize("count", ["0", "-1"])
def test_a_number_of_processes_is_at_least_one(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--nproc", count])
    assert f"--nproc: found {count}, expected 1 or more" in capsys.readouterr().err


def changed(**fields: Any) -> dict[str, Any]:
    return {**make_config("/out").to_dict(), **fields}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        pytest.param(changed(workers="many"), "\n  workers: Input should be a valid integer", id="a wrong value"),
        pytest.param(changed(epocs=3), "\n  epocs: Extra inputs are not permitted", id="an unknown field"),
        pytest.param("hello", ": Input should be", id="no object"),
        pytest.param(
            {"apiVersion": "internvl.dev/v1alpha1", "kind": "InternVLFineTune", "spec": {}},
            "`internvl-trainer resolve CR.yaml > run.yaml` makes a run.yaml of it",
            id="an InternVLFineTune",
        ),
    ],
)
@pytest.mark.parametrize("command", ["run", "report", "merge", "tensorboard"])
def test_a_run_yaml_that_cannot_be_used_is_explained(
    command: str, document: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    assert main([command, "--config", str(path)]) == 78
    error = capsys.readouterr().err
    assert error.startswith(f"{path} cannot be used:")
    assert said in error
    assert "pydantic" not in error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"\xff\xfe", "can't decode", id="no text"),
        pytest.param(b"output: 2024-13-45", "month must be in 1..12", id="no day"),
        pytest.param(b"[" * 20_000, "recursion", id="deeper than YAML is read"),
    ],
)
def test_a_file_that_is_no_run_yaml_is_named(
    content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a folder" / "run.yaml"
    path.parent.mkdir()
    path.write_bytes(content)
    assert main(["run", str(path)]) == 78
    error = capsys.readouterr().err
    assert error.startswith(f"{path} cannot be used:")
    assert said in error


@pytest.mark.parametrize(("chosen", "used"), [("cpu", "cpu"), ("cuda", "cuda"), (None, "cuda")])
def test_a_run_with_gpus_can_be_rehearsed_on_the_processor(
    chosen: str | None, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed(device="cuda")), encoding="utf-8")
    if chosen:
        monkeypatch.setenv("INTERNVL_DEVICE", chosen)
    seen: list[str] = []
    monkeypatch.setattr(single_machine, "run_stages", lambda config, processes: seen.append(config.device) or 0)
    assert main(["run", "--config", str(path)]) == 0
    assert seen == [used]
    assert ("the GPUs of this pod stay idle" in capsys.readouterr().err) == (chosen == "cpu")


def test_an_unknown_device_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed()), encoding="utf-8")
    monkeypatch.setenv("INTERNVL_DEVICE", "tpu")
    assert main(["run", "--config", str(path)]) == 78
    assert "INTERNVL_DEVICE: found 'tpu', expected cpu" in capsys.readouterr().err


def test_a_refused_run_says_where_what_it_made_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = f"{tmp_path}/{'long/' * 30}[report]/index.html"  # wider than a terminal, and no markup
    refusal = StageResult(
        stage="publish", outcome="failed", reason="Refused", message="too low", artifacts={"report": report}
    )

    def refuse(*_: object) -> StageResult:
        raise Rejected(refusal)

    monkeypatch.setattr(single_machine, "stages_of", lambda _config: ["publish"])
    monkeypatch.setattr(single_machine, "run_stage", refuse)
    for of_the_whole_process in ("prepare_environment", "configure_logging"):
        monkeypatch.setattr(single_machine, of_the_whole_process, lambda *_: None)
    assert single_machine.run_stages(make_config(str(tmp_path / "out")), None) == 70
    assert f"      report  {report}\n" in capsys.readouterr().err

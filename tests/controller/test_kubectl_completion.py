"""Shell completion: candidates by position, Cobra's protocol as kubectl reads it, and the scripts in their shells."""

import shutil
import subprocess
from pathlib import Path

import pytest
from internvl_operator.kubectl_ivft import __main__ as program
from internvl_operator.kubectl_ivft.client import UserError
from internvl_operator.kubectl_ivft.completion import SCRIPTS, SHELLS, answer

NAMES = ["coco-lora", "photos"]


def candidates(*words: str) -> list[str]:
    *found, directive = answer(program._parser(), words, lambda before: NAMES)
    assert directive in (":0", ":4")
    return [line.split("\t")[0] for line in found]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(["l"], ["list", "logs"], id="a-command"),
        pytest.param(["status", "c"], ["coco-lora"], id="a-run"),
        pytest.param(["status", "coco-lora", ""], [], id="nothing-follows"),
        pytest.param(["diff", "coco-lora", ""], NAMES, id="the-second-run"),
        pytest.param(["logs", "photos", "--stage", "t"], ["train"], id="a-value-of-an-option"),
        pytest.param(["logs", "--rank", "3", "p"], ["photos"], id="after-a-value"),
        pytest.param(["-n", "team", "why", ""], NAMES, id="after-kubectls-flags"),
        pytest.param(["cost", "photos", "--p"], ["--price"], id="an-option"),
        pytest.param(["completion", ""], list(SHELLS), id="a-shell"),
        pytest.param(["bake", ""], [], id="no-such-command"),
    ],
)
def test_candidates(words: list[str], expected: list[str]) -> None:
    assert candidates(*words) == expected


def test_a_file_is_completed_by_the_shell() -> None:
    assert answer(program._parser(), ["report", "photos", "--out", ""], lambda before: NAMES) == [":0"]


def test_no_cluster_is_no_candidate_and_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect(options: object) -> None:
        raise UserError("no cluster")

    monkeypatch.setattr(program, "_connect", connect)
    assert program.main(["__complete", "status", ""]) == 0
    assert program.complete(["-n", "team", "cost", ""]) == 0
    assert capsys.readouterr() == (":4\n:4\n", "")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_valid(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert script == SCRIPTS[shell]
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True, timeout=20)


def test_bash_offers_the_candidates(tmp_path: Path) -> None:
    fake = tmp_path / "kubectl-ivft"
    fake.write_text('#!/bin/sh\necho "asked: $*" >&2\nprintf "status\\tall of it\\nstop\\n:4\\n"\n')
    fake.chmod(0o755)
    (tmp_path / "script").write_text(SCRIPTS["bash"])
    act = "COMP_WORDS=(kubectl-ivft st); COMP_CWORD=1; _kubectl_ivft; echo ${COMPREPLY[@]}"
    told = subprocess.run(
        ["bash", "-c", f"PATH={tmp_path}:$PATH; source {tmp_path}/script; {act}"],
        capture_output=True, text=True, check=True, timeout=20,
    )  # fmt: skip
    assert told.stdout == "status stop\n"

"""Checkpoints from the Hub, asked of a local stand-in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from trainer.artifacts.hub import Hub
from trainer.runs import environment

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "tokenizer.model": b"tokens",
}

# In a process of its own, as huggingface_hub reads its endpoint while it is imported.
_ASK = """
import sys
from internvl_trainer.artifacts.sources import fetch_directory, list_directory
from internvl_trainer.errors import UserError
try:
    if sys.argv[2] == "list":
        print(sorted(list_directory(sys.argv[1], field="spec.model.source")))
    else:
        folder = fetch_directory(sys.argv[1], field="spec.model.source", weights=sys.argv[2] == "all")
        print(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
except UserError as error:
    print(type(error).__name__, error.reason, error)
"""


def ask(hub: Hub, uri: str, what: str, tmp_path: Path, **variables: str) -> str:
    with hub.serve() as endpoint:
        env = environment(tmp_path, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "hub"), **variables)
        done = subprocess.run(
            [sys.executable, "-c", _ASK, uri, what], env=env, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_snapshot_comes_without_pickles_and_only_once(tmp_path: Path) -> None:
    hub = Hub(FILES)
    expected = str(["config.json", "model.safetensors", "tokenizer.model"])
    assert ask(hub, "hf://owner/model@main", "all", tmp_path) == expected
    assert sorted(hub.downloaded) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert ask(hub, "hf://owner/model@main", "all", tmp_path) == expected
    assert len(hub.downloaded) == 3


def test_preflight_takes_no_weights_but_sees_their_names(tmp_path: Path) -> None:
    hub = Hub(FILES)
    assert ask(hub, "hf://owner/model", "small", tmp_path) == str(["config.json", "tokenizer.model"])
    assert "model.safetensors" in ask(hub, "hf://owner/model", "list", tmp_path)
    assert "model.safetensors" not in hub.downloaded


def test_the_token_of_the_environment_is_used(tmp_path: Path) -> None:
    hub = Hub(FILES, token="hf_right")
    assert "config.json" in ask(hub, "hf://owner/model", "all", tmp_path, HF_TOKEN="hf_right")


NOT_OPEN = "AccessDenied AccessDenied spec.model.source: {}: not found, or not open to this token"


@pytest.mark.parametrize(
    ("uri", "token", "expected"),
    [
        pytest.param("hf://owner/model", "hf_wrong", NOT_OPEN.format("hf://owner/model"), id="gated"),
        pytest.param("hf://owner/other", "hf_right", NOT_OPEN.format("hf://owner/other"), id="no such repository"),
        pytest.param(
            "hf://owner/model@v9",
            "hf_right",
            "UserError NotFound spec.model.source: hf://owner/model@v9: no revision 'v9' in that repository",
            id="no such revision",
        ),
    ],
)
@pytest.mark.parametrize("what", ["list", "all"])
def test_what_a_user_reads_when_the_hub_refuses(uri: str, token: str, expected: str, what: str, tmp_path: Path) -> None:
    assert expected in ask(Hub(FILES, token="hf_right"), uri, what, tmp_path, HF_TOKEN=token)


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    env = environment(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "hub"))
    done = subprocess.run(
        [sys.executable, "-c", _ASK, "hf://owner/model", "all"], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("Unavailable HubUnavailable spec.model.source: hf://owner/model"), done.stderr

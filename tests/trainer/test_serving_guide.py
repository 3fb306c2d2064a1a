"""The request of docs/guides/serving.md, sent to transformers' own server with a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from golden import GOLDEN, checkpoint
from internvl_trainer.__main__ import main
from internvl_trainer.distributed import free_port

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs/guides/serving.md").read_text(encoding="utf-8")
ADDRESS = "http://localhost:8000"
OFFLINE = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "NO_PROXY": "localhost"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model of the guide, `coco`."""
    folder = tmp_path_factory.mktemp("serving")
    assert main(["convert", str(checkpoint("internlm2")), str(folder / "coco"), "--to", "hf"]) == 0
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of transformers' server, started with the guide's command."""
    port = free_port()
    url = ADDRESS.replace("8000", str(port))
    (words,) = re.findall(r"^transformers (serve .*)$", PAGE, re.MULTILINE)
    script = str(Path(__file__).with_name("transformers_server.py"))
    command = [sys.executable, script, *words.replace("8000", str(port)).split()]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, cwd=folder, env=os.environ | OFFLINE, stdout=log, stderr=log) as process,
    ):
        try:
            deadline = time.monotonic() + 300
            while not is_ready(url):
                said = (folder / "log").read_text()[-2000:]
                assert process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.2)
            yield url
        finally:
            process.kill()


def is_ready(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=60) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def served_answer(url: str, folder: Path) -> str:
    """What the guide's curl command gets."""
    section = PAGE.split("\n## One request\n", 1)[1]
    (command,) = re.findall(r"^```\n(curl .*?)^```", section, re.DOTALL | re.MULTILINE)
    assert ADDRESS in command
    done = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, url)],
        cwd=folder, env=os.environ | OFFLINE, check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return str(json.loads(done.stdout)["choices"][0]["message"]["content"])


def own_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    question = "Provide a one-sentence caption for the provided image."
    assert question in PAGE
    capsys.readouterr()
    options = ["--image", str(folder / "photo.jpg"), "--question", question, "--max-new-tokens", "30"]
    assert main(["chat", "--model", str(folder / "coco"), *options]) == 0
    return capsys.readouterr().out.strip()


def test_transformers_server_answers_as_the_trainer_does(
    server: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for picture in ("photo.jpg", "wide.png"):
        shutil.copy(GOLDEN / "data/images" / picture, folder / "photo.jpg")
        answers.append(served_answer(server, folder).strip())
        assert answers[-1] == own_answer(folder, capsys)
    assert answers[0] != answers[1], "the picture counts"

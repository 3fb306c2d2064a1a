"""What preflight says of tasks, before any GPU is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.errors import UserError
from internvl_trainer.evaluate import captions
from internvl_trainer.stages.preflight import run as preflight
from trainer.contexts import context_of
from trainer.evaluations import evaluation_config, write_coco, write_vqa


def check(folder: Path, **task: str) -> dict[str, object]:
    """Preflight of a run with that task; its report."""
    config = evaluation_config(folder, {"mine": task})
    storage = open_storage(config.output, field="spec.output")
    preflight(context_of(config, "preflight"))
    report: dict[str, object] = json.loads(storage.read("stages/preflight/preflight.json"))
    return report


def test_questions_are_counted(tmp_path: Path) -> None:
    report = check(tmp_path, task="vqa", annotation=str(write_vqa(tmp_path, 5)))
    assert report["tasks"] == [{"name": "mine", "questions": 5}]


def test_a_picture_that_cannot_be_decoded(tmp_path: Path) -> None:
    path = write_vqa(tmp_path, 5)
    (tmp_path / "images/002.png").write_bytes(b"no picture")
    (tmp_path / "images/004.png").unlink()
    with pytest.raises(UserError, match=r"vqa\.jsonl:3: image: images/002\.png: cannot be decoded .*and 1 more") as bad:
        check(tmp_path, task="vqa", annotation=str(path))
    assert bad.value.reason == "ImageUndecodable"


def test_an_annotation_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_vqa(tmp_path, 2)
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(UserError, match=r"vqa\.jsonl:3: not valid JSON") as bad:
        check(tmp_path, task="vqa", annotation=str(path))
    assert bad.value.reason == "InvalidJson"


def test_a_prompt_whose_marks_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vqa\.jsonl:1: the question has 2 <image> marks for 1 pictures"):
        check(tmp_path, task="vqa", annotation=str(write_vqa(tmp_path, 2)), prompt="<image><image>?")


def test_captions_need_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions.shutil, "which", lambda _name: None)
    with pytest.raises(UserError, match="need a Java runtime") as bad:
        check(tmp_path, task="caption", annotation=str(write_coco(tmp_path, 2)))
    assert bad.value.reason == "JavaMissing"

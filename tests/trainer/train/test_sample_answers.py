"""Answers to a few held-out rows during training: the model's own, the same rows each time, and never the end of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from internvl_trainer.data.row_schema import ChatRow, RowMedia, Turn
from internvl_trainer.model.greedy_answers import answer
from internvl_trainer.model.load import LoadedModel, load_chat_model
from internvl_trainer.train.chat import open_samples
from internvl_trainer.train.sample_answers import SampleAnswers, draw_rows, question_of
from PIL import Image
from trainer.contexts import Alone, group_context
from trainer.runs import GOLDEN, make_config


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_chat_model(GOLDEN / "checkpoints" / "qwen2", dtype=torch.float32)


def opened(loaded: LoadedModel, folder: Path, annotation: Path, rows: int = 16) -> SampleAnswers:
    config = make_config(
        str(folder / "out"),
        data={"validation": {"held": {"annotation": str(annotation)}}},
        training={"samples": {"everySteps": 2, "rows": rows, "maxNewTokens": 5}},
    )
    found = open_samples(group_context(config, "train", Alone()), loaded)
    assert found is not None
    return found


def answers(samples: SampleAnswers, loaded: LoadedModel, *, stopping: bool = False) -> list[dict[str, Any]] | None:
    engine = SimpleNamespace(eval=loaded.model.eval, train=loaded.model.train)
    found = samples.answers(engine, lambda: stopping)
    assert loaded.model.training
    return found


def test_each_golden_row_has_the_models_own_answer(loaded: LoadedModel, tmp_path: Path) -> None:
    """Texts, one picture, several with the second question about none, and a video."""
    samples = opened(loaded, tmp_path, GOLDEN / "data" / "samples.jsonl")
    found = answers(samples, loaded) or []
    assert [each["row"] for each in found] == list(range(6))
    assert [each["problem"] for each in found] == [None] * 6
    assert found[0]["question"] == "what colour is the cat"
    assert found[0]["reference"] == "a red square!"
    loaded.model.eval()
    assert found[0]["answer"] == answer(loaded, "what colour is the cat", max_new_tokens=5)
    assert answers(samples, loaded) == found
    assert sorted(samples.pictures()) == [2, 3, 4], "rows with a picture"


def test_a_row_that_fails_is_a_problem_and_the_others_are_answered(
    loaded: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{"from": "human", "value": "hello there"}, {"from": "gpt", "value": "hello"}]
    rows = [{"id": 0, "image": "gone.png", "conversations": turns}, {"id": 1, "conversations": turns}]
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = opened(loaded, tmp_path, path)
    gone, whole = answers(samples, loaded) or []
    assert gone["answer"] is None
    assert "gone.png" in gone["problem"]
    assert whole["problem"] is None
    assert "sample row 0 has no answer" in caplog.text
    assert samples.pictures() == {}


def test_a_strip_of_a_picture_is_shown_and_does_not_end_training(loaded: LoadedModel, tmp_path: Path) -> None:
    Image.new("RGB", (2, 2000)).save(tmp_path / "strip.png")
    turns = [{"from": "human", "value": "<image>\nhello there"}, {"from": "gpt", "value": "hello"}]
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps({"id": 0, "image": "strip.png", "conversations": turns}) + "\n")
    assert [*opened(loaded, tmp_path, path).pictures()] == [0]


def test_an_error_of_the_model_is_a_problem_too(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = opened(loaded, tmp_path, GOLDEN / "data" / "samples.jsonl", rows=2)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of everything")

    monkeypatch.setattr(type(loaded.model), "generate", fail)
    found = answers(samples, loaded) or []
    assert [each["problem"] for each in found] == ["RuntimeError: out of everything"] * 2


def test_a_stop_ends_the_round(loaded: LoadedModel, tmp_path: Path) -> None:
    assert answers(opened(loaded, tmp_path, GOLDEN / "data" / "samples.jsonl"), loaded, stopping=True) is None


def test_the_rows_are_drawn_once() -> None:
    chosen = draw_rows(100, 4, seed=42)
    assert chosen == draw_rows(100, 4, seed=42) == sorted({*chosen})
    assert len(chosen) == 4
    assert chosen != draw_rows(100, 4, seed=43)
    assert draw_rows(3, 16, seed=1) == [0, 1, 2]


@pytest.mark.parametrize(
    ("roles", "asked", "reference"),
    [
        pytest.param(["human", "gpt", "human", "gpt"], ["human"], "gpt 1", id="the first question"),
        pytest.param(["system", "human", "gpt"], ["system", "human"], "gpt 2", id="a system turn"),
        pytest.param(["gpt", "human", "gpt"], ["human"], "gpt 2", id="an answer without a question"),
        pytest.param(["human"], ["human"], "", id="a question without an answer"),
    ],
)
def test_what_is_asked_of_a_row(roles: list[Any], asked: list[str], reference: str) -> None:
    row = ChatRow(tuple(Turn(role, f"{role} {place}") for place, role in enumerate(roles)), RowMedia(), "file", 1)
    turns, found = question_of(row)
    assert ([turn.role for turn in turns], found) == (asked, reference)

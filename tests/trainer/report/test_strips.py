"""Answers during training, as strips over the steps."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from internvl_trainer.artifacts.manifest import commit, upload_files
from internvl_trainer.report.page import render_page
from internvl_trainer.report.record import read_record
from internvl_trainer.report.strips import MOST_SHOWN, make_strips
from PIL import Image
from trainer.report.outputs import Output, steps


def answered(row: int, answer: str | None, **changes: Any) -> dict[str, Any]:
    known = {"row": row, "question": "What?", "reference": "a cat", "answer": answer, "at_limit": False}
    return {**known, "problem": None, **changes}


def trained(folder: Path, rounds: list[dict[str, Any]], *, finished: bool = True) -> Output:
    """A run with these rounds of answers; row 3 has a picture."""
    output = Output(folder)
    buffer = io.BytesIO()
    Image.new("RGB", (36, 20), (200, 30, 30)).save(buffer, "JPEG")
    texts = {
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in steps(20)).encode(),
        "samples.jsonl": "".join(json.dumps(each) + "\n" for each in rounds).encode(),
        "samples/3.jpg": buffer.getvalue(),
    }
    paths = {}
    for name, data in texts.items():
        path = folder / "log" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        paths[name] = path
    if finished:
        output.stages.commit("train", output.stages.upload("train", paths), kind="model", steps=20)
    else:
        place = "checkpoints/step-00000020"
        files = upload_files(output.storage, place, {f"journal/{name}": path for name, path in paths.items()})
        commit(output.storage, place, files, output.stages.fingerprint("train"), step=20)
    return output


ROUNDS = [
    {"step": 0, "answers": [answered(3, "[[["), answered(7, "no")]},
    {"step": 10, "answers": [answered(3, "a cat"), answered(7, None, problem="RowError: <b>gone.png</b> is absent")]},
    {"step": 20, "answers": [answered(3, "a cat"), answered(7, "a cat and", at_limit=True)]},
]


def test_equal_answers_are_one_entry(tmp_path: Path) -> None:
    for finished in (True, False):
        first, second = make_strips(read_record(trained(tmp_path / f"{finished}", ROUNDS, finished=finished).stages))
        assert [(entry.steps, entry.text) for entry in first.entries] == [("step 0", "[[["), ("steps 10–20", "a cat")]
        assert [entry.note for entry in second.entries] == [
            "", "no answer: RowError: <b>gone.png</b> is absent", "cut",
        ]  # fmt: skip
        assert (first.picture or "").startswith("data:image/jpeg;base64,")
        assert second.picture is None


def test_a_long_strip_shows_its_ends(tmp_path: Path) -> None:
    rounds = [{"step": step, "answers": [answered(3, f"answer {step}")]} for step in range(40)]
    (strip,) = make_strips(read_record(trained(tmp_path, rounds).stages))
    assert len(strip.entries) == MOST_SHOWN
    assert (strip.entries[0].first, strip.entries[-1].last, strip.left_out) == (0, 39, 40 - MOST_SHOWN)


def test_rows_that_change_between_attempts_have_strips_of_their_own(tmp_path: Path) -> None:
    other = {"question": "Which?", "reference": "a dog"}
    rounds = [
        {"step": 0, "answers": [answered(3, None, question="", reference="", problem="gone"), answered(7, "no")]},
        {"step": 10, "answers": [answered(3, "a cat")]},
        {"step": 20, "answers": [answered(1, "one"), answered(3, "a dog", **other), answered(7, "yes")]},
    ]
    strips = make_strips(read_record(trained(tmp_path, rounds).stages))
    assert [(strip.question, [(entry.steps, entry.text) for entry in strip.entries]) for strip in strips] == [
        ("What?", [("step 0", ""), ("step 10", "a cat")]),
        ("Which?", [("step 20", "a dog")]),
        ("What?", [("step 0", "no"), ("step 20", "yes")]),
        ("What?", [("step 20", "one")]),
    ]
    assert [strip.picture is not None for strip in strips] == [True, False, False, False]


def test_the_page_shows_them_as_data(tmp_path: Path) -> None:
    page = render_page(read_record(trained(tmp_path, ROUNDS).stages), {}, [], [])
    assert "Answers during training" in page
    assert "steps 10–20" in page
    assert "&lt;b&gt;gone.png" in page
    assert "<b>gone.png" not in page


def test_a_run_without_samples_has_no_such_section(tmp_path: Path) -> None:
    page = render_page(read_record(Output(tmp_path).train(20).stages), {}, [], [])
    assert "Answers during training" not in page

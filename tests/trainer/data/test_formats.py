"""Every format: the same rows give the same ids, labels and pixels, and messages name the user's own fields."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import DATASET, checkpoint, settings, tokenizer_of
from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.formats.open_source import Opened, open_source
from internvl_trainer.data.formats.source import media_opener, read_row
from internvl_trainer.data.sample import Sample, build_sample
from internvl_trainer.errors import UserError
from trainer.data.format_files import FORMATS, MEDIA, PICTURES, FormatFile, write_upstream


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    from internvl_trainer.artifacts import sources

    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path_factory.mktemp("cache")))
    sources._cache.cache_clear()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The golden media, some of them under COCO's names."""
    folder = tmp_path / "media"
    shutil.copytree(MEDIA, folder)
    for number in range(20):
        shutil.copy(MEDIA / PICTURES[number % 4], folder / f"COCO_train2014_{number:012d}.jpg")
    return folder


def samples(opened: Opened, root: Path) -> list[Sample]:
    tokenizer, style = tokenizer_of(checkpoint("qwen2")), settings("Hermes-2", compat="default")
    dataset = DATASET.__class__("any", root=str(root), annotation="rows")
    made = []
    for row in range(len(opened.rows)):
        parsed, findings = read_row(opened.rows, row, "rows")
        assert parsed is not None, findings
        assert findings == []
        made.append(build_sample(parsed, dataset, style, tokenizer, media_opener(opened.rows, open_media)))
    return made


def assert_equal(found: list[Sample], expected: list[Sample]) -> None:
    assert len(found) == len(expected) == 20
    for one, other in zip(found, expected, strict=True):
        for name in ("input_ids", "labels", "tiles", "image_flags"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("file", [pytest.param(file, id=file.name) for file in FORMATS])
def test_the_same_rows_give_the_same_ids_labels_and_pixels(file: FormatFile, tmp_path: Path, root: Path) -> None:
    upstream = open_source(str(write_upstream(tmp_path, file.rows)), "auto", field="spec.data.train.x")
    path = file.write(tmp_path, file.rows)
    questions = str(tmp_path / file.questions) if file.questions else None
    opened = open_source(str(path), "auto", field="spec.data.train.x", questions=questions)
    assert opened.taken_for == file.taken_for
    expected = samples(upstream, root)
    assert_equal(samples(opened, root), expected)
    assert_equal(samples(pickle.loads(pickle.dumps(opened)), root), expected)  # in a worker process


TURNS = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "a cat"}]


@pytest.mark.parametrize(
    ("record", "reason", "text"),
    [
        pytest.param(
            {"messages": [{"role": "tool", "content": "x"}]},
            "UnknownRole",
            "messages[0].role: found 'tool'; expected user, assistant or system",
            id="a tool",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}, TURNS[1]]},
            "ValueNotText",
            "messages[0].content[0]: expected a part of type text, image, image_url or video",
            id="audio",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, TURNS[1]]},
            "ImageMissing",
            "messages[0].content[0]: found no image for this part; name it here or in `images`",
            id="a picture that nothing names",
        ),
        pytest.param(
            {"messages": [TURNS[0], {**TURNS[1], "loss": False}]},
            "FieldUnsupported",
            "messages[1].loss: training cannot use this field; remove it",
            id="an answer without loss",
        ),
        pytest.param(
            {"messages": TURNS, "images": [{"width": 3}]}, "ImageInvalid", "images[0]: expected a path", id="no path"
        ),
        pytest.param(
            {"messages": TURNS, "images": ["a.png"], "image": "b.png"},
            "ImageInvalid",
            "image: found images and image; keep one of them",
            id="two fields of pictures",
        ),
        pytest.param(
            {"messages": TURNS, "images": ["/etc/passwd"]},
            "PathLeavesRoot",
            "image: '/etc/passwd' leaves the dataset's root; expected a path below it",
            id="a path outside",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": "<bbox>"}, TURNS[1]], "objects": {"bbox": [[1, 2, 3, 4]]}},
            "ObjectsInvalid",
            "objects.bbox[0]: boxes in pixels need the picture's size; add `width` and `height`, or use bbox_type ",
            id="pixels without a size",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": "<bbox><bbox>"}, TURNS[1]], "objects": {"bbox": [[1, 2, 3, 4]]}},
            "ObjectsInvalid",
            "objects.bbox: 2 <bbox> marks for 1 entries",
            id="a box too few",
        ),
        pytest.param({"query": "what", "response": None}, "ValueNotText", "response: expected text", id="no answer"),
        pytest.param(
            {"image": "a.png", "caption": []},
            "ValueNotText",
            "caption: expected a caption, found an empty list",
            id="no captions",
        ),
        pytest.param({"messages": TURNS, "tools": "[]x"}, "FieldUnsupported", "tools: training cannot", id="tools"),
    ],
)
def test_a_record_that_cannot_be_converted_is_a_finding_with_its_own_field(
    record: dict[str, Any], reason: str, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{json.dumps(record)}\n")
    row, findings = read_row(open_source(str(path), "auto", field="x").rows, 0, "rows.jsonl")
    assert row is None
    assert [(finding.reason, finding.line) for finding in findings] == [(reason, 2)]
    assert str(findings[0]).startswith(f"rows.jsonl:2: {text}")


def test_a_broken_record_among_others_keeps_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n{broken\n" + json.dumps([1]) + "\n")
    rows = open_source(str(path), "auto", field="x").rows
    found = [read_row(rows, row, "f")[1] for row in range(3)]
    assert [[(each.reason, each.line) for each in one] for one in found] == [
        [],
        [("InvalidJson", 2)],
        [("NotAnObject", 3)],
    ]


def test_boxes_are_written_as_the_model_knows_them(tmp_path: Path) -> None:
    record = {
        "messages": [
            {"role": "user", "content": "<image>Where is <ref-object>?"},
            {"role": "assistant", "content": "<bbox>, and <bbox>"},
        ],
        "images": ["a.png"],
        "objects": {"ref": ["the cat"], "bbox": [[0, 50, 100, 200], [1, 2, 3, 4]], "width": 200, "height": 400},
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record))
    row, _ = read_row(open_source(str(path), "auto", field="x").rows, 0, "f")
    assert row is not None
    assert [turn.text for turn in row.turns] == [
        "<image>Where is <ref>the cat</ref>?",
        "<box>[[0, 125, 500, 500]]</box>, and <box>[[5, 5, 15, 10]]</box>",
    ]


@pytest.mark.parametrize(
    ("name", "content", "form", "message"),
    [
        pytest.param("a.jsonl", b"", "auto", "the annotation file has no rows", id="empty"),
        pytest.param("a.json", b"[]", "auto", "the annotation file has no rows", id="an empty array"),
        pytest.param("a.json", b'[{"a": 1}', "auto", "the JSON document ends early; is the file complete?", id="cut"),
        pytest.param(
            "a.json",
            b'{\n"rows": [{}]}',
            "auto",
            "expected a JSON array of rows, or COCO's or VQAv2's document; found an object with the arrays: rows",
            id="another document",
        ),
        pytest.param("a.parquet", b"PAR1" + b"x" * 600, "auto", "not a whole Parquet file", id="half a Parquet file"),
        pytest.param("a.arrow", b"ARROW1" + b"x" * 600, "auto", "not a whole Arrow file", id="half an Arrow file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(
    name: str, content: bytes, form: Any, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path / name), form, field="spec.data.train.x")
    assert caught.value.message.startswith(message)
    assert caught.value.where == str(tmp_path / name)


def test_vqav2_asks_for_its_questions(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [{"question_id": 1}]}))
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path / "a.json"), "auto", field="spec.data.train.x")
    assert str(caught.value).startswith("spec.data.train.x.questions: VQAv2's questions are in a file of their own")


def test_records_on_one_line_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"messages": TURNS}] * 3))
    rows = open_source(str(tmp_path / "a.json"), "auto", field="x").rows
    assert [rows.line_number(row) for row in range(3)] == [1, 2, 3]


def test_stored_media_that_are_not_there_are_a_missing_file(tmp_path: Path) -> None:
    parquet = next(file for file in FORMATS if file.name == "parquet")
    rows = open_source(str(parquet.write(tmp_path, parquet.rows)), "auto", field="x").rows
    opener = media_opener(rows, open_media)
    for path in ("@record/99/images/0", "@record/1/none", "@record/x/images", "@record/3/images/7"):
        with pytest.raises(FileNotFoundError):
            opener("root", path)

"""Records with a list of captions: one row for each in training, all of them references in evaluation."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from golden import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from internvl_api.spec.evaluation import EvaluationTask
from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.diagnostics import RowError
from internvl_trainer.data.formats.open_source import Opened, open_source
from internvl_trainer.data.formats.source import media_opener, read_row
from internvl_trainer.data.open_datasets import OpenDataset
from internvl_trainer.evaluate.tasks import open_task

RECORDS: list[dict[str, Any]] = [
    {"image": "images/wide.png", "caption": ["a cat", " a dog "]},
    {"image": "images/photo.jpg", "caption": "one caption"},
    {"image": "images/tall.png", "caption": ["a horse"]},
    {"image": "images/square.jpg", "caption": ["1", "2", "3"]},
]
ANSWERS = ["a cat", "a dog", "one caption", "a horse", "1", "2", "3"]
PICTURES = [0, 0, 1, 2, 3, 3, 3]
LINES = [1, 1, 2, 3, 4, 4, 4]


def write_lines(folder: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    path = folder / "captions.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def write_array(folder: Path) -> Path:
    path = folder / "captions.json"
    path.write_text("[" + ",\n".join(map(json.dumps, RECORDS)) + "]")
    return path


def write_coco(folder: Path) -> Path:
    path = folder / "coco.json"
    images = [{"id": number, "file_name": record["image"]} for number, record in enumerate(RECORDS)]
    captions = [{"image_id": number, "caption": record["caption"]} for number, record in enumerate(RECORDS)]
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    return path


def write_parquet(folder: Path) -> Path:
    path = folder / "captions.parquet"
    lists = [each if isinstance(each := record["caption"], list) else [each] for record in RECORDS]
    stored = [(GOLDEN / "data" / record["image"]).read_bytes() for record in RECORDS]
    pq.write_table(pa.table({"image": pa.array(stored, pa.binary()), "caption": lists}), path)
    return path


def opened(path: Path) -> Opened:
    return open_source(str(path), "auto", field="spec.data.train.x")


@pytest.mark.parametrize("write", [write_lines, write_array, write_coco, write_parquet])
def test_each_caption_is_a_row_on_its_record_s_line(tmp_path: Path, write: Any) -> None:
    source = opened(write(tmp_path))
    assert source.taken_for.endswith(", one row for each caption")
    for rows in (source.rows, pickle.loads(pickle.dumps(source.rows))):
        read = [read_row(rows, number, "captions") for number in range(len(rows))]
        assert [findings for _, findings in read] == [[]] * len(ANSWERS)
        assert [row.turns[-1].text for row, _ in read if row] == ANSWERS
        assert [row.line for row, _ in read if row] == LINES
        opener = media_opener(rows, open_media)
        shown = [opener(str(GOLDEN / "data"), row.media.images[0].path) for row, _ in read if row]
        assert shown == [(GOLDEN / "data" / RECORDS[number]["image"]).read_bytes() for number in PICTURES]


def test_every_row_of_a_bad_line_is_left_out(tmp_path: Path) -> None:
    rows = opened(write_lines(tmp_path)).rows
    dataset = OpenDataset(DatasetDescription("x", "", "captions", repeat_time=2), rows)
    assert dataset.epoch_rows([4]).tolist() == [0, 1, 2, 3] * 2
    assert dataset.epoch_rows([1, 3]).tolist() == [2, 4, 5, 6] * 2


def test_a_list_after_many_single_captions_is_a_finding(tmp_path: Path) -> None:
    single = [{"image": "a.png", "caption": "one"}] * 100
    rows = opened(write_lines(tmp_path, [*single, {"image": "a.png", "caption": ["one", "two"]}])).rows
    assert len(rows) == 101
    with pytest.raises(RowError, match="list captions from the first record on"):
        rows[100]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.none() | st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=4), min_size=1, max_size=9))
def test_rows_are_counted_as_they_are_read(tmp_path_factory: pytest.TempPathFactory, captions: list[Any]) -> None:
    records = [{"image": "a.png", "caption": ["first", "second"]}]
    records += [{"image": "a.png", "caption": caption} for caption in captions]
    rows = opened(write_lines(tmp_path_factory.mktemp("captions"), records)).rows
    expected = [
        (line, text)
        for line, record in enumerate(records, 1)
        for text in (record["caption"] if isinstance(record["caption"], list) else [record["caption"]]) or [None]
    ]
    assert [rows.line_number(number) for number in range(len(rows))] == [line for line, _ in expected]
    for number, (_, text) in enumerate(expected):
        if text is None:
            with pytest.raises(RowError):
                rows[number]
        else:
            assert json.loads(rows[number])["conversations"][1]["value"] == text.strip()


@pytest.mark.parametrize("write", [write_lines, write_array, write_coco])
def test_all_captions_are_references_in_evaluation(tmp_path: Path, write: Any) -> None:
    annotation = str(write(tmp_path))
    task = open_task("caption", EvaluationTask.model_validate({"task": "caption", "annotation": annotation}))
    assert [question.references for question in task.questions] == [
        ("a cat", " a dog "),
        ("one caption",),
        ("a horse",),
        ("1", "2", "3"),
    ]

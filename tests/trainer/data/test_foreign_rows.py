"""Rows and files of other tools that hold something unexpected: nothing is lost or misread silently."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.formats.open_source import Opened, open_source
from internvl_trainer.data.formats.source import media_opener, read_row
from internvl_trainer.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "what"}, {"role": "assistant", "content": "a cat"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
CONVERSATIONS = [[{"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}]]


def opened(path: Path, content: bytes, **options: str) -> Opened:
    path.write_bytes(content)
    return open_source(str(path), "auto", field="spec.data.train.x", **options)


def findings(source: Opened, row: int = 0) -> list[str]:
    return [f"{each.severity}: {each}".replace("f:1: ", "") for each in read_row(source.rows, row, "f")[1]]


def texts(source: Opened) -> list[str]:
    row, _ = read_row(source.rows, 0, "f")
    assert row is not None
    return [turn.text for turn in row.turns]


@pytest.mark.parametrize(
    "record",
    [
        pytest.param({"messages": [USER, ASSISTANT]}, id="messages"),
        pytest.param({"conversations": [USER, ASSISTANT]}, id="sharegpt"),
        pytest.param({"query": "what", "response": "a cat"}, id="query-response"),
    ],
)
@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("imgae", "a.png", "error: imgae: the field is not known; did you mean 'image'?"),
        ("system_prompt", "Be brief.", "error: system_prompt: the field is not known; did you mean 'system'?"),
        ("system", ["Be brief."], "error: system: expected text, found a list"),
        ("options", ["a", "b"], "warning: options: the field is not known and not read"),
    ],
)
def test_unknown_fields_of_converted_rows_are_findings(
    record: dict[str, Any], field: str, value: object, found: str, tmp_path: Path
) -> None:
    assert findings(opened(tmp_path / "rows.jsonl", json.dumps({**record, field: value}).encode())) == [found]


@pytest.mark.parametrize(
    ("turns", "fields", "found"),
    [
        (
            [{**USER, "image": "a.png"}, ASSISTANT],
            {},
            "error: conversations[0].image: media belong to the row, not to a turn; move them to the row's 'image'",
        ),
        (
            [USER, {**ASSISTANT, "reasoning_content": "whiskers"}],
            {},
            "warning: conversations[1].reasoning_content: the field is not known and not read",
        ),
        (
            [USER, {**ASSISTANT, "weight": 0}],
            {},
            "error: messages[1].weight: training cannot use this field; remove it",
        ),
        ([USER, {**ASSISTANT, "loss": 0.0}], {}, "error: messages[1].loss: training cannot use this field; remove it"),
        (
            [{"role": "user", "content": [{"type": None, "text": "what"}]}, ASSISTANT],
            {},
            "error: messages[0].content[0]: expected a part of type text, image, image_url or video",
        ),
        (
            [{"role": "system", "content": "Be long."}, USER, ASSISTANT],
            {"system": "Be brief."},
            "error: system: the row has another system turn in conversations; keep one of the two",
        ),
    ],
)
def test_unknown_parts_of_messages_are_findings(
    turns: list[dict[str, Any]], fields: dict[str, Any], found: str, tmp_path: Path
) -> None:
    assert findings(opened(tmp_path / "rows.jsonl", json.dumps({"messages": turns, **fields}).encode())) == [found]


def test_answers_that_count_are_learned_from(tmp_path: Path) -> None:
    turns = [USER, {**ASSISTANT, "weight": 1, "loss": True, "name": None}]
    assert findings(opened(tmp_path / "rows.jsonl", json.dumps({"messages": turns}).encode())) == []


@pytest.mark.parametrize("box", ["[1, 2, NaN, 4]", "[1, 2, 3, 1e999]", "[-9, 2, 3, 4]", "[1, 2, 300, 4]"])
def test_a_box_outside_of_its_picture_is_a_finding(box: str, tmp_path: Path) -> None:
    text = '{"query": "where", "response": "<bbox>", "width": 10, "height": 10, "objects": {"bbox": [' + box + "]}}"
    (found,) = findings(opened(tmp_path / "rows.jsonl", text.encode()))
    assert found.startswith("error: objects.bbox[0]: found [")
    assert "outside of the picture (10 x 10)" in found


def test_boxes_are_written_into_queries_and_responses(tmp_path: Path) -> None:
    row = {"query": "where", "response": "<bbox>", "width": 10, "height": 20, "objects": {"bbox": [[1, 2, 10, 20]]}}
    assert texts(opened(tmp_path / "rows.jsonl", json.dumps(row).encode()))[1] == "<box>[[100, 100, 1000, 1000]]</box>"


def test_a_box_that_rounding_put_outside_ends_at_the_edge(tmp_path: Path) -> None:
    box = [-3, 0, 641, 484.8]
    row = {"query": "where", "response": "<bbox>", "width": 640, "height": 480, "objects": {"bbox": [box]}}
    assert texts(opened(tmp_path / "rows.jsonl", json.dumps(row).encode()))[1] == "<box>[[0, 0, 1000, 1000]]</box>"


def test_a_row_that_speaks_of_a_picture_file_is_no_caption_line(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "rename cat.jpg, please"}, {"from": "gpt", "value": "done"}]
    source = opened(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + json.dumps({"conversations": turns}).encode())
    assert source.taken_for == "chat rows in JSON Lines"


def test_captions_in_another_encoding_are_findings(tmp_path: Path) -> None:
    text = "一只猫在桌子上".encode("gbk")
    lines = opened(tmp_path / "captions.txt", b"image,caption\na.png," + text)
    assert read_row(lines.rows, 0, "f")[1][0].reason == "InvalidEncoding"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as shard:
        for name, content in (("0.png", b"x"), ("0.txt", text)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    (found,) = findings(opened(tmp_path / "a.tar", packed.getvalue()))
    assert found == "error: txt: not valid UTF-8 (byte 6); convert the text: iconv -t UTF-8"


@pytest.mark.parametrize("second", ["[]", '{"conversations": []}'])
def test_a_second_document_in_a_file_is_refused(second: str, tmp_path: Path) -> None:
    first = json.dumps([{"conversations": CONVERSATIONS[0]}])
    with pytest.raises(UserError, match=r"rows.json:2: a second JSON document begins here; keep one array in a file"):
        opened(tmp_path / "rows.json", f"{first}\n{second}".encode())


@pytest.mark.parametrize("odd", [[1], None, 10**30, "x"])
def test_odd_ids_of_captions_and_questions_are_findings(odd: object, tmp_path: Path) -> None:
    captions = {"images": [{"id": odd, "file_name": "a.png"}], "annotations": [{"image_id": odd, "caption": "a cat"}]}
    findings(opened(tmp_path / "captions.json", json.dumps(captions).encode()))
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps({"questions": [{"question_id": odd, "question": "what", "image_id": 1}]}))
    answers = {"annotations": [{"question_id": odd, "multiple_choice_answer": "cat"}]}
    source = opened(tmp_path / "answers.json", json.dumps(answers).encode(), questions=str(questions))
    assert "question_id: found" in findings(source)[0]


def test_a_question_without_text_is_a_finding(tmp_path: Path) -> None:
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps({"questions": [{"question_id": 1, "image_id": 1}]}))
    answers = {"annotations": [{"question_id": 1, "multiple_choice_answer": "cat"}]}
    source = opened(tmp_path / "answers.json", json.dumps(answers).encode(), questions=str(questions))
    assert findings(source) == ["error: question_id: the question 1 of the other file has no text"]


def parquet(path: Path, **columns: pa.Array) -> Opened:
    pq.write_table(pa.table(columns), path)
    return open_source(str(path), "auto", field="spec.data.train.x")


def test_texts_in_columns_of_bytes_are_texts(tmp_path: Path) -> None:
    source = parquet(tmp_path / "a.parquet", query=[b"what"], response=["猫".encode()], image=[b"\x89PNG"])
    assert texts(source) == ["what", "猫"]
    turns = [[{"from": "human", "value": b"what"}, {"from": "gpt", "value": "猫".encode()}]]
    assert texts(parquet(tmp_path / "b.parquet", conversations=pa.array(turns))) == ["what", "猫"]


@pytest.mark.parametrize(
    "column",
    [
        pytest.param(pa.array([b"\x89PNG"], pa.binary(4)), id="of fixed size"),
        pytest.param(pa.array([b"\x89PNG"]).dictionary_encode(), id="dictionary"),
        pytest.param(pa.array([b"\x89PNG"], pa.binary_view()), id="views"),
    ],
)
def test_pictures_in_every_kind_of_bytes_are_read(column: pa.Array, tmp_path: Path) -> None:
    source = parquet(tmp_path / "a.parquet", conversations=pa.array(CONVERSATIONS), image=column)
    row, _ = read_row(source.rows, 0, "f")
    assert row is not None
    assert media_opener(source.rows, open_media)("", row.media.images[0].path) == b"\x89PNG"


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    table = pa.table({"conversations": pa.array(CONVERSATIONS * 300)})
    pq.write_table(table, tmp_path / "a.parquet", compression="snappy")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[100:200] = bytes(100)
    with pytest.raises(UserError, match="not a whole Parquet file"):
        opened(tmp_path / "a.parquet", bytes(content))
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="not a whole Arrow file"):
        opened(tmp_path / "a.arrow", (tmp_path / "a.arrow").read_bytes()[:-4000])


def test_a_pointer_among_shards_and_questions_is_named(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.parquet").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"0.parquet: the annotation file is a git-lfs pointer"):
        open_source(str(tmp_path / "*.parquet"), "auto", field="spec.data.train.x")
    pq.write_table(pa.table({"conversations": pa.array(CONVERSATIONS)}), tmp_path / "0.parquet")
    with pytest.raises(UserError, match=r"1.parquet: the annotation file is a git-lfs pointer"):
        open_source(str(tmp_path / "*.parquet"), "auto", field="spec.data.train.x")
    answers = json.dumps({"annotations": [{"question_id": 1, "multiple_choice_answer": "cat"}]}).encode()
    with pytest.raises(UserError, match=r"1.parquet: the annotation file is a git-lfs pointer"):
        opened(tmp_path / "answers.json", answers, questions=str(tmp_path / "1.parquet"))

import json
import pickle
from pathlib import Path

import pytest
from internvl_trainer.data.index import RowIndex
from internvl_trainer.errors import UserError


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "rows", "lines"),
    [
        pytest.param('{"a":1}\n{"b":2}\n', ['{"a":1}', '{"b":2}'], [1, 2], id="plain"),
        pytest.param('{"a":1}\n{"b":2}', ['{"a":1}', '{"b":2}'], [1, 2], id="no newline at the end"),
        pytest.param('{"a":1}\r\n{"b":2}\r\n', ['{"a":1}', '{"b":2}'], [1, 2], id="windows"),
        pytest.param('\n{"a":1}\n\n  \n{"b":2}\n\n', ['{"a":1}', '{"b":2}'], [2, 5], id="blank lines are no rows"),
        pytest.param('{"a":1}', ['{"a":1}'], [1], id="one row"),
        pytest.param('{"ü":"日本"}\n{"b":2}\n', ['{"ü":"日本"}', '{"b":2}'], [1, 2], id="not ascii"),
    ],
)
def test_rows_and_their_lines(tmp_path: Path, text: str, rows: list[str], lines: list[int]) -> None:
    index = RowIndex.build(write(tmp_path / "a.jsonl", text))
    assert [index[row].decode() for row in range(len(index))] == rows
    assert [index.line_number(row) for row in range(len(index))] == lines


@pytest.mark.parametrize("text", ["", "\n\n", "   \n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.jsonl", text)
    with pytest.raises(UserError) as caught:
        RowIndex.build(path)
    assert (caught.value.reason, str(caught.value)) == ("AnnotationEmpty", f"{path}: the annotation file has no rows")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        RowIndex.build(tmp_path / "no.jsonl")
    assert caught.value.reason == "AnnotationMissing"
    assert str(caught.value) == f"{tmp_path / 'no.jsonl'}: the annotation file is not there; check the path"


def test_an_index_travels_to_worker_processes_after_use(tmp_path: Path) -> None:
    index = RowIndex.build(write(tmp_path / "a.jsonl", '{"a":1}\n{"b":2}\n'))
    assert index[0]
    assert pickle.loads(pickle.dumps(index))[1] == b'{"b":2}'


def test_a_row_costs_eight_bytes(tmp_path: Path) -> None:
    rows = 100_000
    index = RowIndex.build(write(tmp_path / "a.jsonl", "".join(f'{{"id": {row}}}\n' for row in range(rows))))
    assert len(pickle.dumps(index)) < 8 * rows + 2000
    assert json.loads(index[77_777]) == {"id": 77_777}


@pytest.mark.parametrize("row", [-1, 2])
def test_rows_outside_are_an_error(tmp_path: Path, row: int) -> None:
    index = RowIndex.build(write(tmp_path / "a.jsonl", '{"a":1}\n{"b":2}\n'))
    with pytest.raises(IndexError, match=f"row {row} of 2"):
        index[row]


@pytest.mark.parametrize(
    ("content", "reason", "step"),
    [
        pytest.param('{"a": 1}\n'.encode("utf-16"), "AnnotationEncoding", "iconv -f UTF-16", id="utf-16"),
        pytest.param(b"\xfe\xff" + '{"a": 1}\n'.encode("utf-16-be"), "AnnotationEncoding", "iconv", id="big endian"),
        pytest.param(b'{"a": 1}\r{"a": 2}\r', "AnnotationEncoding", "CR alone", id="cr only"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "AnnotationIsPointer", "git lfs pull", id="lfs"),
        pytest.param(b"PK\x03\x04 and so on", "AnnotationCompressed", "unpack it", id="zip"),
        pytest.param(b"\x1f\x8b\x08 and so on", "AnnotationCompressed", "gunzip", id="gzip"),
    ],
)
def test_a_file_that_is_not_lines_of_text_is_refused_once(
    tmp_path: Path, content: bytes, reason: str, step: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError) as refused:
        RowIndex.build(tmp_path / "rows.jsonl")
    assert refused.value.reason == reason
    assert step in str(refused.value)


def test_lines_that_end_with_crlf_are_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\r\n{"a": 2}\r\n')
    assert len(RowIndex.build(tmp_path / "rows.jsonl")) == 2

"""Video bytes in columns and shards are read as video files are; bytes under a name that is not read are refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from golden import checkpoint, settings, tokenizer_of
from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.formats.export import write_upstream
from internvl_trainer.data.formats.open_source import Opened, open_source
from internvl_trainer.data.formats.source import media_opener, read_row
from internvl_trainer.data.sample import Sample, build_sample

TURNS = [{"from": "human", "value": "<video>\nwhat"}, {"from": "gpt", "value": "a cat"}]


def mp4(frames: int = 6) -> bytes:
    """A tiny video that becomes brighter."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 16
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), number * 40, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


CLIP = mp4()


def write_table(path: Path, column: pa.Array, name: str = "video", **columns: Any) -> Path:
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    table = pa.table({name: column, "conversations": pa.array([columns.get("turns", TURNS)], pa.list_(turn))})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return path


def write_shard(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(opened: Opened, root: Path) -> Sample:
    row, findings = read_row(opened.rows, 0, "rows")
    assert row is not None, findings
    dataset = DatasetDescription("any", root=str(root), annotation="rows")
    style = settings("Hermes-2", compat="default")
    tokenizer = tokenizer_of(checkpoint("qwen2"))
    return build_sample(row, dataset, style, tokenizer, media_opener(opened.rows, open_media))


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLUMNS = {
    "bytes": pa.array([CLIP], pa.binary()),
    "large bytes": pa.array([CLIP], pa.large_binary()),
    "bytes and path": pa.array([{"bytes": CLIP, "path": "a.mp4"}], STRUCT),
    "bytes without a path": pa.array([{"bytes": CLIP, "path": None}], STRUCT),
    "a list": pa.array([[CLIP]], pa.list_(pa.binary())),
    "a list of bytes and path": pa.array([[{"bytes": CLIP, "path": "a.mp4"}]], pa.list_(STRUCT)),
}


def of_a_file(folder: Path) -> Sample:
    """The sample of the same row with the video as a file."""
    (folder / "clip.mp4").write_bytes(CLIP)
    (folder / "rows.jsonl").write_text(json.dumps({"video": "clip.mp4", "conversations": TURNS}) + "\n")
    return sample(open_source(str(folder / "rows.jsonl"), "auto", field="x"), folder)


def assert_same(found: Sample, expected: Sample) -> None:
    np.testing.assert_array_equal(found.input_ids, expected.input_ids)
    np.testing.assert_array_equal(found.tiles, expected.tiles)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("name", ["video", "videos"])
def test_a_column_of_videos_is_read(tmp_path: Path, suffix: str, kind: str, name: str) -> None:
    opened = open_source(str(write_table(tmp_path / f"x.{suffix}", COLUMNS[kind], name)), "auto", field="x")
    assert_same(sample(opened, tmp_path), of_a_file(tmp_path))
    done = write_upstream(opened.rows, "x", tmp_path / "out.jsonl")
    (stored,) = (path for path in done.folder.rglob("*") if path.is_file())
    assert (stored.suffix, stored.read_bytes()) == (".mp4", CLIP)


@pytest.mark.parametrize("suffix", ["mp4", "MP4", "clip.mov", "m4v"])
def test_a_member_of_a_shard_is_read(tmp_path: Path, suffix: str) -> None:
    row = ("0.json", json.dumps({"conversations": TURNS}).encode())
    opened = open_source(str(write_shard(tmp_path / "x.tar", (f"0.{suffix}", CLIP), row)), "auto", field="x")
    assert_same(sample(opened, tmp_path), of_a_file(tmp_path))


def test_two_videos_are_refused(tmp_path: Path) -> None:
    row = ("0.json", json.dumps({"conversations": TURNS}).encode())
    shard = write_shard(tmp_path / "x.tar", ("0.a.mp4", CLIP), ("0.b.mp4", CLIP), row)
    rows = open_source(str(shard), "auto", field="x").rows
    (finding,) = read_row(rows, 0, "x.tar")[1]
    assert finding.reason == "VideoInvalid"


@pytest.mark.parametrize("name", ["mp4", "clip", "audio", "video_data", "media"])
def test_bytes_in_another_column_are_refused_by_name(tmp_path: Path, name: str) -> None:
    turns = [{"from": "human", "value": "what"}, TURNS[1]]
    path = write_table(tmp_path / "x.parquet", COLUMNS["bytes"], name, turns=turns)
    row, findings = read_row(open_source(str(path), "auto", field="x").rows, 0, "x.parquet")
    assert row is None
    assert [(each.reason, each.field, each.line) for each in findings] == [("FieldUnsupported", name, 1)]


@pytest.mark.parametrize("suffix", ["heic", "jxl", "ogv", "wav"])
def test_members_that_cannot_be_read_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    turns = [{"from": "human", "value": "what"}, TURNS[1]]
    row = ("0.json", json.dumps({"conversations": turns}).encode())
    shard = write_shard(tmp_path / "x.tar", (f"0.{suffix}", b"media"), row)
    found, findings = read_row(open_source(str(shard), "auto", field="x").rows, 0, "x.tar")
    assert found is None
    assert [(each.reason, each.field) for each in findings] == [("FieldUnsupported", suffix)]

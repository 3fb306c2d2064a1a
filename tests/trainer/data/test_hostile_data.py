"""Data made to exhaust or confuse the trainer: each input is a finding of its row."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from golden import checkpoint, settings, tokenizer_of
from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.dataset_meta import DatasetDescription, read_meta
from internvl_trainer.data.diagnostics import Finding, findings_table
from internvl_trainer.data.index import RowIndex
from internvl_trainer.data.pictures import ImageProblem, decode_image
from internvl_trainer.data.row_checks import Checker, check_rows
from internvl_trainer.data.video import VideoProblem, read_frames
from internvl_trainer.errors import UserError
from internvl_trainer.evaluate.annotations import read_questions
from internvl_trainer.json_text import InvalidJson, parse_json
from internvl_trainer.model.checkpoint_format.files import CheckpointError, read_json
from internvl_trainer.retrieval.caption_files import read_captions
from rich.console import Console

LONG_NUMBER = "9" * 5000
TURNS = [{"from": "human", "value": "<image>what"}, {"from": "gpt", "value": "a cat"}]
GOOD = {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}]}


def png_header(width: int, height: int) -> bytes:
    """A PNG of this size whose pixels are missing; 177 million of one colour take half a megabyte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


def motion_jpeg(width: int, height: int, frames: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), format="rgb24")
        for packet in (*(packet for _ in range(frames) for packet in stream.encode(frame)), *stream.encode()):
            container.mux(packet)
    return buffer.getvalue()


def findings_of(lines: list[bytes], folder: Path) -> list[Finding]:
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    dataset = DatasetDescription("shop", str(folder), "rows.jsonl")
    tokenizer = tokenizer_of(checkpoint("qwen2"))
    checker = Checker(dataset, settings("Hermes-2", compat="default"), open_media, tokenizer)
    return check_rows(RowIndex.build(folder / "rows.jsonl"), checker)


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (f'{{"id": {LONG_NUMBER}}}'.encode(), "InvalidJson", "a number of more than 4300 digits"),
        (b'{"video": "x.mp4", "clip": [0, 1e999]}', "ClipInvalid", "expected [start, end] in seconds"),
        (b'{"video": "x.mp4", "clip": [0, ' + b"9" * 4000 + b"]}", "ClipInvalid", "expected [start, end] in seconds"),
        (b'{"id": "' + b"x" * (20 << 20) + b'"}', "RowTooLong", "more than 16 MiB in one line"),
    ],
    ids=["5000 digits", "infinite clip", "clip of 4000 digits", "long line"],
)
def test_a_row_is_a_finding_with_file_and_line(line: bytes, reason: str, message: str, tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode()
    found = [finding for finding in findings_of([good, line, good], tmp_path) if finding.reason == reason]
    assert [(finding.file, finding.line) for finding in found] == [("rows.jsonl", 2)]
    assert message in found[0].message
    assert len(found[0].message) < 500


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "large.png",
            png_header(13300, 13300),
            "it has 13300 x 13300 pixels, 177 million; expected at most 89 million",
        ),
        ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify image file"),
        ("photo [/2].jpg", b"no picture", "cannot identify image file"),
    ],
    ids=["pixels", "postscript", "markup"],
)
def test_a_picture_is_a_finding_that_can_be_shown(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    found = findings_of([json.dumps({"image": name, "conversations": TURNS}).encode()], tmp_path)
    assert [(finding.reason, finding.line) for finding in found] == [("ImageUndecodable", 1)]
    assert message in found[0].message
    console = Console(width=300, file=io.StringIO())
    console.print(findings_table(found))
    assert name in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_table_shows_markup_and_control_sequences_as_text() -> None:
    finding = Finding("Reason", "found [start, end], [bold]x[/nope] and \x1b[2J", "clip", file="a[/].jsonl", line=1)
    console = Console(width=200, file=io.StringIO())
    console.print(findings_table([finding]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "found [start, end], [bold]x[/nope] and \\x1b[2J" in shown
    assert "\x1b" not in shown


@pytest.mark.slow
def test_frames_have_a_bound_before_they_are_decoded() -> None:
    with pytest.raises(VideoProblem, match="its frames have 6400 x 6400 pixels; expected at most 36 million"):
        read_frames(motion_jpeg(6400, 6400, 2), min_frames=2, max_frames=2, sampling="middle")


def test_all_frames_together_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internvl_trainer.data.video.MOST_VIDEO_BYTES", 5 * 64 * 64 * 3)
    clip = motion_jpeg(64, 64, 8)
    assert len(read_frames(clip, min_frames=5, max_frames=5, sampling="middle")) == 5
    with pytest.raises(VideoProblem, match="take fewer, or scale it down"):
        read_frames(clip, min_frames=6, max_frames=6, sampling="middle")


@pytest.mark.parametrize("text", ["[" * 100_000, f"[{LONG_NUMBER}]", "{", "", "\x00", '"\\ud83d', "[1, 2"])
def test_no_json_is_one_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidJson):
        parse_json(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(tmp_path / "config.json", missing="")
    with pytest.raises(UserError, match=r"meta\.json"):
        read_meta(text, "meta.json")


@pytest.mark.parametrize("value", ["1e999", "NaN", "9" * 4000, "-1"])
def test_a_repeat_time_is_a_finite_number(value: str) -> None:
    meta = f'{{"a": {{"root": "/r", "annotation": "/a.jsonl", "repeat_time": {value}}}}}'
    with pytest.raises(UserError, match=r"repeat_time: expected a number"):
        read_meta(meta, "meta.json")


def test_a_long_line_of_a_task_or_of_captions_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"caption": "' + b"x" * (17 << 20) + b'"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: found more than 16 MiB in one line"):
        read_questions(path, "rows.jsonl")
    path.write_bytes(b"image,caption\na.jpg," + b"x" * (17 << 20) + b"\na.jpg,short\n")
    captions = read_captions(path, "flickr", name="rows.csv")
    assert ("RowTooLong", "rows.csv", 2) in [(found.reason, found.file, found.line) for found in captions.findings]
    assert [row.caption for row in captions.rows] == ["short"]


def test_a_picture_at_the_bound_is_judged_by_its_size_alone() -> None:
    with pytest.raises(ImageProblem, match="million; expected"):
        decode_image(png_header(10_000, 8_901))

"""Videos as pictures, and pictures as text: what a media field may hold, and what it must not be mistaken for."""

from __future__ import annotations

import base64
import io
import json
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from golden import DATASET, GOLDEN, chat_row, checkpoint, settings, tokenizer_of
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from internvl_trainer.artifacts import media_listing
from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data import frames as frames_module
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.diagnostics import RowError
from internvl_trainer.data.frames import choose_frames, read_video
from internvl_trainer.data.media import fetch_media
from internvl_trainer.data.media_names import is_base64_picture, natural_order, shown_path
from internvl_trainer.data.row_schema import MediaFile, RowMedia, parse_chat_row
from internvl_trainer.data.sample import Sample, build_sample
from PIL import Image
from trainer.data.test_row_checks import check_row, checker

TURNS = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}]
STYLE = settings("Hermes-2", compat="default")


def picture(shade: int = 0, kind: str = "PNG", size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, kind)
    return buffer.getvalue()


def write_frames(folder: Path, count: int) -> Path:
    """Frames whose grey values are their numbers, written without leading zeros and among other files."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"frame_{number}.png").write_bytes(picture(number))
    (folder / "._frame_0.png").write_bytes(b"resource fork")
    (folder / "times.txt").write_text("0 1 2")
    return folder


def shades(media: RowMedia, root: str, **changes: object) -> list[int]:
    read = read_video(media, settings("Hermes-2", **changes), root, open_media)
    return [frame.getpixel((0, 0))[0] for frame in read]


def video(value: object) -> RowMedia:
    return RowMedia.from_fields({"video": value})


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_folder_of_frames_is_a_video_in_the_order_of_their_numbers(tmp_path: Path, kind: str) -> None:
    folder = write_frames(tmp_path / "clips" / "walk", 12)
    root = tmp_path / "clips"
    if kind == "zip":
        root = tmp_path / "clips.zip"
        with zipfile.ZipFile(root, "w") as archive:
            for path in sorted(folder.iterdir()):
                archive.write(path, f"walk/{path.name}")
    for path in ("walk", "walk/", "./walk"):
        assert shades(video(path), str(root), max_frames=12) == list(range(12))
    assert shades(video("walk"), str(root), max_frames=4) == [1, 4, 7, 10]


def test_a_list_of_frames_keeps_its_order(tmp_path: Path) -> None:
    write_frames(tmp_path / "walk", 12)
    paths = [f"walk/frame_{number}.png" for number in (10, 2, 7)]
    assert shades(video(paths), str(tmp_path), max_frames=5) == [10, 2, 7]
    assert shades(video(paths), str(tmp_path), max_frames=1) == [2]


def test_a_short_folder_gives_each_frame_once_as_upstream(tmp_path: Path) -> None:
    write_frames(tmp_path / "walk", 3)
    assert shades(video("walk"), str(tmp_path), max_frames=8) == [0, 1, 2]


def test_a_folder_of_too_many_files_is_not_cut_short_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_frames(tmp_path / "walk", 5)
    for module in (media_listing, frames_module):
        monkeypatch.setattr(module, "MOST_IN_FOLDER", 3)
    with pytest.raises(RowError, match="walk is a folder of more than 3 files"):
        shades(video("walk"), str(tmp_path))


@examples(max_examples=60, deadline=None)
@given(total=st.integers(1, 200), count=st.integers(1, 32), seed=st.none() | st.integers(0, 99))
def test_chosen_frames_are_in_order_and_at_most_as_many_as_asked_for(total: int, count: int, seed: int | None) -> None:
    style = settings("Hermes-2", min_frames=count, max_frames=count, frame_sampling="rand")
    chosen = choose_frames(total, style, None if seed is None else np.random.default_rng(seed))
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(total, count)
    assert set(chosen) <= set(range(total))


@examples(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20, unique=True), st.booleans())
def test_numbers_in_names_count_as_numbers(numbers: list[int], padded: bool) -> None:
    names = [f"a{number:09d}.jpg" if padded else f"a{number}.jpg" for number in numbers]
    assert sorted(names, key=natural_order) == [name for _, name in sorted(zip(numbers, names, strict=True))]


@examples(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=12))
def test_any_names_can_be_sorted(names: list[str]) -> None:
    assert sorted(sorted(names, key=natural_order, reverse=True), key=natural_order) == sorted(names, key=natural_order)


def build(content: dict[str, object], root: Path) -> Sample:
    dataset = DatasetDescription("any", root=str(root), annotation="rows")
    return build_sample(chat_row(content), dataset, STYLE, tokenizer_of(checkpoint("qwen2")), open_media)


def test_frames_become_the_same_sample_in_every_form(tmp_path: Path) -> None:
    write_frames(tmp_path / "walk", 4)
    listed = build({"video": [f"walk/frame_{n}.png" for n in range(4)], "conversations": TURNS}, tmp_path)
    folder = build({"video": "walk", "conversations": TURNS}, tmp_path)
    alone = build({"video": ["walk"], "conversations": TURNS}, tmp_path)
    for other in (folder, alone):
        np.testing.assert_array_equal(listed.input_ids, other.input_ids)
        np.testing.assert_array_equal(listed.tiles, other.tiles)
    assert len(listed.tiles) == 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_bare_base64_is_a_picture(tmp_path: Path, kind: str) -> None:
    data = picture(200, kind, (8, 8))
    text = base64.b64encode(data).decode()
    (tmp_path / "same").write_bytes(data)
    path = build({"image": "same", "conversations": TURNS}, tmp_path)
    inline = build({"image": text, "conversations": TURNS}, tmp_path)
    listed = build({"image": [text], "conversations": TURNS}, tmp_path)
    np.testing.assert_array_equal(inline.tiles, path.tiles)
    np.testing.assert_array_equal(listed.tiles, path.tiles)


def test_a_path_that_exists_is_never_taken_for_base64(tmp_path: Path) -> None:
    text = base64.b64encode(picture(1, "GIF", (1, 1))).decode()
    assert is_base64_picture(text)
    assert "/" not in text
    (tmp_path / text).write_bytes(b"the file")
    assert fetch_media(MediaFile(text, "image"), str(tmp_path), open_media) == b"the file"
    (tmp_path / text).unlink()
    assert fetch_media(MediaFile(text, "image"), str(tmp_path), open_media).startswith(b"GIF8")


@pytest.mark.parametrize(
    "path",
    [
        "images/photo.jpg",
        "iVBORw0KGgo",
        "iVBORw0KGgo" + "A" * 40 + ".png",
        "iVBORw0KGgo" + "A" * 44 + " ",
        "iVBORw0KGgo" + "A" * 44 + "\n",
        "iVBORw0KGgo" + "-_" * 22 + "A",
        "abcdefgh" * 8,
        "/etc/passwd" * 4,
        "x" * 4096,
    ],
)
def test_other_text_is_a_path(path: str) -> None:
    assert not is_base64_picture(path)


@pytest.mark.parametrize("field", ["image", "video"])
def test_base64_that_is_no_picture_is_a_short_finding(tmp_path: Path, field: str) -> None:
    text = base64.b64encode(bytes(6000)).decode()
    row = chat_row({field: text, "conversations": TURNS})
    dataset = DatasetDescription("any", root=str(tmp_path), annotation="rows")
    with pytest.raises(RowError) as caught:
        build_sample(row, dataset, STYLE, tokenizer_of(checkpoint("qwen2")), open_media)
    assert [each.reason for each in caught.value.findings] == [
        "ImageUndecodable" if field == "image" else "VideoMissing"
    ]
    assert len(str(caught.value)) < 300


def test_a_row_cannot_hold_more_text_than_a_line() -> None:
    text = "iVBORw0KGgo" + "A" * (17 << 20)
    row, findings = parse_chat_row(json.dumps({"image": text, "conversations": TURNS}).encode(), "rows", 1)
    assert row is None
    assert [each.reason for each in findings] == ["RowTooLong"]


@examples(max_examples=100, deadline=None)
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: base64.b64encode(data).decode()))
def test_any_text_as_an_image_is_a_sample_or_a_finding(text: str) -> None:
    row, findings = parse_chat_row(
        json.dumps({"image": text, "conversations": TURNS}).encode(errors="surrogatepass"), "rows", 1
    )
    if row is None:
        assert findings
        return
    assert shown_path(text)[:40] == text[:40]
    with suppress(RowError):
        build_sample(row, DATASET, STYLE, tokenizer_of(checkpoint("qwen2")), open_media)


def test_a_list_of_one_video_is_the_video() -> None:
    assert RowMedia.from_fields({"video": ["videos/clip.mp4"]}) == RowMedia.from_fields({"video": "videos/clip.mp4"})
    assert build({"video": ["videos/clip.mp4"], "conversations": TURNS}, GOLDEN / "data").image_flags.sum() == 5


HUMAN, GPT = TURNS


@pytest.mark.parametrize(
    ("reason", "message", "row"),
    [
        (
            "VideoInvalid",
            "video: found a list of 2 paths; a row has one video, or a list of its frames as pictures",
            {"video": ["a.mp4", "b.mp4"], "conversations": [HUMAN, GPT]},
        ),
        (
            "VideoInvalid",
            "video[1]: expected a path, found null",
            {"video": ["a.png", None], "conversations": [HUMAN, GPT]},
        ),
        (
            "VideoInvalid",
            "video: expected a path or a list of paths, found an object",
            {"video": {"path": "a.mp4"}, "conversations": [HUMAN, GPT]},
        ),
        (
            "VideoUnreadable",
            "video: videos is a folder without pictures; expected a video file, or a folder of its frames",
            {"video": "videos", "conversations": [HUMAN, GPT]},
        ),
        (
            "ClipInvalid",
            "clip: frames that are pictures have no time to cut a clip by; remove clip, or list the frames of the clip",
            {"video": "images/", "clip": [0, 1], "conversations": [HUMAN, GPT]},
        ),
        (
            "VideoUndecodable",
            "video[1]: page.jpg: cannot be decoded (cannot identify image file",
            {"video": ["images/wide.png", "page.jpg"], "conversations": [HUMAN, GPT]},
        ),
    ],
)
def test_a_broken_video_of_pictures(tmp_path: Path, reason: str, message: str, row: dict[str, object]) -> None:
    shutil.copytree(GOLDEN / "data", tmp_path / "media")
    (tmp_path / "media" / "page.jpg").write_text("<html>404</html>")
    (finding,) = check_row(row, checker(tmp_path / "media"), tmp_path)
    assert (finding.reason, finding.severity) == (reason, "error")
    assert str(finding).startswith(message)


def test_preflight_looks_at_every_frame_that_training_may_draw(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "walk", 40)
    (folder / "frame_39.png").write_bytes(b"<html>404</html>")
    (finding,) = check_row({"video": "walk", "conversations": TURNS}, checker(tmp_path), tmp_path)
    assert (finding.reason, finding.field) == ("VideoUndecodable", "video")
    assert finding.message.startswith("walk/frame_39.png: cannot be decoded")


def test_a_folder_of_transparent_frames_is_a_warning_once(tmp_path: Path) -> None:
    (tmp_path / "walk").mkdir()
    for number in range(3):
        Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "walk" / f"{number}.png")
    (finding,) = check_row({"video": "walk", "conversations": [HUMAN, GPT]}, checker(tmp_path), tmp_path)
    assert (finding.reason, finding.severity, finding.field) == ("ImageTransparent", "warning", "video")
    assert finding.message.startswith("walk/0.png: it has transparent pixels, shown on white")

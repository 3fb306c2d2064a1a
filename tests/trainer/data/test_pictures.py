"""Pictures of every depth, transparency and orientation: shown as a person sees them, or refused with advice."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import checkpoint, settings, tokenizer_of
from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.diagnostics import Finding
from internvl_trainer.data.index import RowIndex
from internvl_trainer.data.pictures import (
    Background,
    Decoding,
    ImageProblem,
    decode_image,
    decode_with_notes,
    small_jpeg,
)
from internvl_trainer.data.row_checks import Checker, check_rows
from PIL import Image

SIDE = 16
RAMP = np.tile(np.linspace(0, 1, SIDE), (SIDE, 1))


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def reasons(data: bytes, decoding: Decoding | None = None) -> list[str]:
    return [note.reason for note in decode_with_notes(data, decoding or Decoding())[1]]


DEEP = {
    "16-bit PNG": (RAMP * 65535, np.uint16, "PNG"),
    "16-bit TIFF": (RAMP * 65535, np.uint16, "TIFF"),
    "int32 of 8 bits": (RAMP * 255, np.int32, "TIFF"),
    "int32 of 16 bits": (RAMP * 65535, np.int32, "TIFF"),
    "float 0 to 1": (RAMP, np.float32, "TIFF"),
    "float 0 to 255": (RAMP * 255, np.float32, "TIFF"),
    "float 0 to 65535": (RAMP * 65535, np.float32, "TIFF"),
}


@pytest.mark.parametrize("case", DEEP)
def test_deep_grey_is_scaled_by_its_depth(case: str) -> None:
    values, dtype, kind = DEEP[case]
    image, notes = decode_with_notes(saved(Image.fromarray(values.astype(dtype)), kind))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[..., 0].astype(float) - RAMP * 255).max() <= 1
    assert [note.reason for note in notes] == ["ImageScaled"]
    assert "percentiles 1, 50 and 99.9" in notes[0].message


UNCLEAR = {
    "12 bits in 16": (RAMP * 4095, np.uint16, "PNG"),
    "Hounsfield units": (RAMP * 3000 - 1000, np.int32, "TIFF"),
    "negative floats": (RAMP - 0.5, np.float32, "TIFF"),
    "beyond 16 bits": (RAMP * 1e6, np.int32, "TIFF"),
    "millimetres": (RAMP * 5000, np.float32, "TIFF"),
    "not a number": (np.where(RAMP > 0.5, np.nan, RAMP), np.float32, "TIFF"),
    "infinite": (np.where(RAMP > 0.5, np.inf, RAMP), np.float32, "TIFF"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_a_range_that_fits_no_depth_is_refused_with_advice(case: str) -> None:
    values, dtype, kind = UNCLEAR[case]
    with pytest.raises(ImageProblem, match="write it with 8 bits a channel"):
        decode_image(saved(Image.fromarray(values.astype(dtype)), kind))


def test_a_black_picture_of_16_bits_is_black() -> None:
    image = decode_image(saved(Image.fromarray(np.zeros((4, 4), np.uint16))))
    assert not np.asarray(image).any()


def transparent(mode: str) -> bytes:
    """Black, transparent on the left half and opaque on the right."""
    alpha = np.where(np.arange(SIDE) < SIDE // 2, 0, 255).astype(np.uint8) * np.ones((SIDE, 1), np.uint8)
    layered = Image.fromarray(np.dstack([np.zeros((SIDE, SIDE, 3), np.uint8), alpha]))
    if mode == "P":
        paletted = Image.fromarray((alpha > 0).astype(np.uint8), "P")
        paletted.putpalette([0, 0, 0, 0, 0, 0])
        return saved(paletted, transparency=0)
    if mode == "RGB":
        opaque = Image.fromarray(np.dstack([alpha * 0 + 10 * (alpha == 0)] * 3).astype(np.uint8))
        return saved(opaque, transparency=(10, 10, 10))
    return saved(layered.convert(mode), "WEBP" if mode == "WEBP" else "PNG")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize(("background", "left"), [("white", 255), ("black", 0)])
def test_transparent_pixels_show_the_background(mode: str, background: Background, left: int) -> None:
    image, notes = decode_with_notes(transparent(mode), Decoding(background=background))
    pixels = np.asarray(image)
    assert (pixels[:, : SIDE // 2] == left).all()
    assert (pixels[:, SIDE // 2 :] == 0).all()
    assert [note.reason for note in notes] == ["ImageTransparent"]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_without_a_background_the_transparency_is_dropped_as_upstream_does(mode: str) -> None:
    data = transparent(mode)
    image, notes = decode_with_notes(data, Decoding(background="none"))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert notes == []


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_picture_with_an_alpha_channel_is_unchanged(mode: str) -> None:
    opaque = Image.fromarray((RAMP * 255).astype(np.uint8)).convert(mode)
    image, notes = decode_with_notes(saved(opaque))
    assert np.array_equal(np.asarray(image), np.asarray(opaque.convert("RGB")))
    assert notes == []


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_is_ignored_or_applied_and_said_either_way(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.new("RGB", (40, 20)), kind, exif=exif)
    expected = [] if orientation == 1 else ["ImageOrientation"]
    assert decode_image(data).size == (40, 20)
    assert reasons(data) == expected
    upright = Decoding(apply_orientation=True)
    assert decode_image(data, upright).size == ((20, 40) if orientation > 4 else (40, 20))
    assert reasons(data, upright) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull", id="lfs"),
        pytest.param(b'<svg xmlns="x"></svg>', "is an SVG", id="svg"),
        pytest.param(b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg/>', "is an SVG", id="svg with a prolog"),
        pytest.param(b"\n<!DOCTYPE html><html>404", "is a web page", id="web page"),
        pytest.param(b"<HTML>", "is a web page", id="old web page"),
        pytest.param(b"%PDF-1.7", "is a PDF", id="pdf"),
        pytest.param(b"\0\0\0\x18ftypheic\0\0\0\0", "is HEIC", id="heic"),
    ],
)
def test_what_is_no_picture_is_called_by_its_name(data: bytes, message: str) -> None:
    with pytest.raises(ImageProblem, match=message):
        decode_image(data)


def test_a_picture_too_large_to_be_safe_gets_a_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    with pytest.raises(ImageProblem, match="scale the picture down"):
        decode_image(saved(Image.new("RGB", (100, 100))))


def findings_of(image: str, root: Path, **changes: object) -> list[Finding]:
    path = root / "rows.jsonl"
    row = {"image": image, "conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "yes"}]}
    path.write_text(json.dumps(row))
    dataset = DatasetDescription("shop", str(root), "rows.jsonl")
    checker = Checker(
        dataset, settings("Hermes-2", compat="default", **changes), open_media, tokenizer_of(checkpoint("qwen2"))
    )
    return check_rows(RowIndex.build(path), checker)


def test_a_data_url_is_read_as_the_picture_it_holds(tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(saved(Image.new("RGB", (60, 60)))).decode()
    assert findings_of(url, tmp_path) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        pytest.param("data:image/png;base64,%%%", "is no valid data: URL", id="not base64"),
        pytest.param("data:image/png;base64,AAAA", "cannot be decoded", id="no picture"),
        pytest.param("data:,hello", "cannot be decoded", id="text"),
    ],
)
def test_a_broken_data_url_is_a_short_finding(tmp_path: Path, url: str, message: str) -> None:
    (finding,) = findings_of(url, tmp_path)
    assert finding.severity == "error"
    assert message in finding.message
    assert len(str(finding)) < 250


def test_a_warning_about_a_picture_lets_the_row_train(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(transparent("RGBA"))
    (finding,) = findings_of("a.png", tmp_path)
    assert (finding.reason, finding.severity, finding.field) == ("ImageTransparent", "warning", "image")
    assert finding.message == "a.png: it has transparent pixels, shown on white (image.background)"


@pytest.mark.parametrize(
    ("size", "small"),
    [
        ((800, 400), (360, 180)),
        ((40, 80), (180, 360)),
        ((1, 5000), (1, 360)),
        ((2000, 2), (360, 1)),
        ((1, 1), (360, 360)),
    ],
)
def test_a_small_copy_has_every_shape_of_picture(size: tuple[int, int], small: tuple[int, int]) -> None:
    assert Image.open(io.BytesIO(small_jpeg(Image.new("RGB", size), 360))).size == small

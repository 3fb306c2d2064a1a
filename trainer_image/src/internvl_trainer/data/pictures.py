"""The bytes of a picture become RGB pixels: every depth, transparency and orientation decided, none by accident."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..git_lfs import POINTER

_ORIENTATION = 0x0112  # EXIF
_EIGHT_BIT, _SIXTEEN_BIT = 255, 65535
_USED = 1 / 8  # of the depth's range; a picture whose brightest pixels stay below this was not meant for this depth
_PERCENTILES = (1, 50, 99.9)
_TEXTS = {
    POINTER: "is a git-lfs pointer; run `git lfs pull` where the pictures come from",
    b"<svg": "is an SVG drawing; convert it to PNG",
    b"<!doctype": "is a web page, as a failed download leaves it; download the picture again",
    b"<html": "is a web page, as a failed download leaves it; download the picture again",
    b"%pdf": "is a PDF; convert its pages to PNG",
}
MOST_PIXELS = 89_000_000
"""Maximum pixels of a picture; decoding takes 4 bytes for each."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MOST_PIXELS is the smaller bound

# Formats of pictures alone: no PostScript, which starts another program, and no container of other files.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# What Pillow's plugins raise for bytes that are no picture; they let errors of parsing through.
_UNDECODABLE = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError,
    NotImplementedError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")

Background = Literal["white", "black", "none"]


class ImageProblem(ValueError):
    """The bytes cannot be decoded to the end as an image."""


@dataclass(frozen=True)
class Decoding:
    """How to decode what RGB cannot hold: orientation and transparency.

    Attributes:
        apply_orientation: turn the picture as its EXIF orientation says; upstream ignores it.
        background: colour under transparent pixels; "none" drops the transparency, as upstream does.
    """

    apply_orientation: bool = False
    background: Background = "white"

    @classmethod
    def of(cls, exif: str, background: Background, compat: str = "default") -> Decoding:
        """From the values of image.exif, image.background and data.compat; upstream drops transparency."""
        return cls(apply_orientation=exif == "apply", background="none" if compat == "upstream" else background)


@dataclass(frozen=True)
class Note:
    """Something about a picture that a user should know, in the form of a finding."""

    reason: str
    message: str


DEFAULT = Decoding()


def decode_image(data: bytes, decoding: Decoding = DEFAULT) -> Image.Image:
    """The RGB image, fully decoded.

    Raises:
        ImageProblem: the bytes are empty, of unknown format or cut short, or their range of values is unclear;
            training never sees half an image.
    """
    return decode_with_notes(data, decoding)[0]


def decode_with_notes(data: bytes, decoding: Decoding = DEFAULT) -> tuple[Image.Image, list[Note]]:
    """The RGB image, fully decoded, and notes about its orientation, transparency and depth."""
    if not data:
        raise ImageProblem("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        check_pixels(*image.size)
        image.load()
    except ImageProblem:
        raise
    except _UNDECODABLE as error:
        raise ImageProblem(_unreadable(data, error)) from error
    turned, notes = _orient(image, decoding)
    if turned.mode == "RGB" and not turned.has_transparency_data:
        return turned, notes
    if turned.mode.startswith(("I", "F")):
        shown, note = _scale(turned)
    elif turned.has_transparency_data:
        shown, note = _flatten(turned, decoding)
    else:
        shown, note = turned.convert("RGB"), None
    return shown, notes + ([note] if note else [])


def small_jpeg(picture: Image.Image, side: int) -> bytes:
    """A JPEG of the picture with `side` pixels on its longest side."""
    return as_jpeg(small_copy(picture, side))


def small_copy(picture: Image.Image, side: int) -> Image.Image:
    """A copy with `side` pixels on its longest side; a strip keeps one pixel on the other."""
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.resize((width, height))


def as_jpeg(picture: Image.Image) -> bytes:
    """The picture as a JPEG of middling quality."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def check_pixels(width: int, height: int) -> None:
    """Raises ImageProblem for a picture that would take too much memory: about 4 bytes for each pixel."""
    if width * height > MOST_PIXELS:
        raise ImageProblem(
            f"it has {width} x {height} pixels, {width * height / 1e6:.0f} million; expected at most "
            f"{MOST_PIXELS // 1_000_000} million, so scale it down"
        )


def _unreadable(data: bytes, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"{error}; scale the picture down, or leave the row out"
    start = data[:200].lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    for beginning, what in _TEXTS.items():
        if start.startswith(beginning) or (start.startswith(b"<?xml") and beginning in data[:1000].lower()):
            return f"cannot be decoded (cannot identify image file), {len(data)} bytes: it {what}"
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        return f"cannot be decoded (cannot identify image file), {len(data)} bytes: it is HEIC; convert it to JPEG"
    # The text of an UnidentifiedImageError holds a memory address, which changes each time.
    said = "cannot identify image file" if isinstance(error, UnidentifiedImageError) else error
    return f"cannot be decoded ({said}), {len(data)} bytes"


def _orient(image: Image.Image, decoding: Decoding) -> tuple[Image.Image, list[Note]]:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):  # broken EXIF says nothing
        return image, []
    if orientation not in range(2, 9):
        return image, []
    if not decoding.apply_orientation:
        message = "its EXIF orientation is ignored, as upstream does; image.exif: apply turns it upright"
        return image, [Note("ImageOrientation", message)]
    message = "it is turned as its EXIF orientation says (image.exif: apply)"
    return ImageOps.exif_transpose(image), [Note("ImageOrientation", message)]


def _flatten(image: Image.Image, decoding: Decoding) -> tuple[Image.Image, Note | None]:
    """The picture on the background; pixels that are all opaque need none."""
    layered = image.convert("RGBA")
    if np.asarray(layered)[..., 3].min() == _EIGHT_BIT or decoding.background == "none":
        return image.convert("RGB"), None
    ground = Image.new("RGBA", image.size, decoding.background)
    message = f"it has transparent pixels, shown on {decoding.background} (image.background)"
    return Image.alpha_composite(ground, layered).convert("RGB"), Note("ImageTransparent", message)


def _scale(image: Image.Image) -> tuple[Image.Image, Note | None]:
    """Grey values of more than 8 bits scaled to 8 by their depth, which their range shows."""
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all():
        raise ImageProblem(f"holds values that are no numbers (mode {image.mode}); write it with 8 bits a channel")
    low, middle, high = np.percentile(values, _PERCENTILES)
    seen = f"percentiles 1, 50 and 99.9: {low:.6g}, {middle:.6g} and {high:.6g}"
    depth = _depth(image.mode, float(values.min()), float(values.max()))
    if depth is None or (depth == _SIXTEEN_BIT and high < _SIXTEEN_BIT * _USED and values.max() > 0):
        raise ImageProblem(
            f"its values ({seen}) do not fill a depth of 8 or 16 bits, as medical and depth pictures do; "
            f"choose the window yourself and write it with 8 bits a channel"
        )
    grey = np.clip(np.rint(values * (_EIGHT_BIT / depth)), 0, _EIGHT_BIT).astype(np.uint8)
    shown = Image.fromarray(grey).convert("RGB")
    return shown, Note("ImageScaled", f"its values are scaled from 0–{depth:.6g} to 8 bits ({seen})")


def _depth(mode: str, least: float, most: float) -> float | None:
    """The value of white; None when the range of values fits no depth."""
    if least < 0 or most > _SIXTEEN_BIT:
        return None
    if mode == "F" and most <= 1:
        return 1
    return _EIGHT_BIT if most <= _EIGHT_BIT and not mode.startswith("I;16") else _SIXTEEN_BIT

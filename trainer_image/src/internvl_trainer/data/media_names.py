"""Classify the text of a row's media field: a path, a `data:` URL, or a picture in bare base64."""

from __future__ import annotations

import base64
import re

STORED = "@record/"
"""Prefix of the path of a picture or video that the annotation itself holds: @record/<number>/<column>[/<position>]."""

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "ppm", "jp2")
"""Suffixes of picture files, in lower case."""
VIDEOS = ("mp4", "webm", "mkv", "avi", "mov", "m4v", "flv", "wmv", "mpg", "mpeg")
"""Suffixes of video files, in lower case."""

LONGEST_PATH = 4096
"""Maximum characters of a path; longer text names no file."""
_LONGEST_BASE64 = 16 << 20  # characters
_SHORTEST_BASE64 = 40  # characters of the smallest picture
_SHOWN = 120
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
_HEAD = 64  # characters that are decoded to see how the bytes begin
_DIGITS = re.compile(r"([0-9]+)")


def is_inline(path: str) -> bool:
    """Whether the text is a `data:` URL, which holds the file itself."""
    return path.startswith("data:") and "," in path


def is_base64_picture(path: str) -> bool:
    """Whether the text is base64 (RFC 4648, without line ends) that begins like a picture, or is too long for a path.

    It may also be the path of a file, which takes precedence.
    """
    if not _SHORTEST_BASE64 <= len(path) <= _LONGEST_BASE64 or len(path) % 4 or not _BASE64.fullmatch(path):
        return False
    return len(path) > LONGEST_PATH or base64.b64decode(path[:_HEAD]).startswith(_BEGINNINGS)


def is_picture_name(path: str) -> bool:
    """Whether a path has the suffix of a picture, or is a `data:` URL of one."""
    return path.startswith("data:image/") or _suffix(path) in PICTURES


def is_video_name(path: str) -> bool:
    """Whether a path has the suffix of a video."""
    return _suffix(path) in VIDEOS


def shown_path(path: str) -> str:
    """The path for messages; text that holds a file is cut short."""
    holds_file = is_inline(path) or (len(path) > _SHOWN and is_base64_picture(path))
    return f"{path[:40]}…" if holds_file else path


def natural_order(path: str) -> tuple[list[tuple[int, str]], str]:
    """A sort key that compares numbers in names as numbers: frame2 comes before frame10."""
    parts = [part for part in _DIGITS.split(path) if part]
    numbers = [part.lstrip("0") for part in parts]
    return [
        (len(number) + 1, number) if part[0].isdigit() else (0, part.casefold())
        for part, number in zip(parts, numbers, strict=True)
    ], path


def stored_suffix(path: str) -> str:
    """The suffix of a member of a tar, from its stored path; empty for a column of a table, which has none."""
    name = "".join(path.split("/")[2:3]).rpartition(".")[2].lower()
    return name if name in (*PICTURES, *VIDEOS) else ""


def _suffix(path: str) -> str:
    return stored_suffix(path) if path.startswith(STORED) else path.rpartition("/")[2].rpartition(".")[2].lower()

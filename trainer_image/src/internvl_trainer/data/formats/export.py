"""Any annotation as upstream's JSONL, with the media that it holds as files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..diagnostics import Finding, RowError
from ..media import OpenMedia
from ..media_names import STORED, stored_suffix
from .source import RowSource, media_opener, parse_record

_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
_VIDEO_BEGINNINGS = {b"\x1aE\xdf\xa3": "mkv", b"RIFF": "avi", b"FLV": "flv"}  # other videos are taken for mp4


@dataclass
class Exported:
    """What was written; `left_out` counts records that could not be converted, which `findings` explain."""

    folder: Path
    rows: int = 0
    media: int = 0
    left_out: int = 0
    findings: list[Finding] = field(default_factory=list)


def write_upstream(source: RowSource, annotation: str, target: Path) -> Exported:
    """Write every row to `target`, and stored media below <target's name>.media/ beside it, one row at a time."""
    done = Exported(target.with_suffix(".media"))
    with target.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for number in range(len(source)):
            line = source.line_number(number)
            try:
                row = parse_record(source[number])
                if row is None:
                    raise RowError([Finding("NotAnObject", "expected a JSON object")])
                _save_media(row, number, source, done)
            except RowError as error:
                done.left_out += 1
                done.findings += [finding.at(annotation, line) for finding in error.findings]
                continue
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            done.rows += 1
    return done


def _save_media(row: dict[str, Any], number: int, source: RowSource, done: Exported) -> None:
    opener = media_opener(source, _elsewhere)
    for name in ("image", "video"):
        paths = row.get(name)
        if isinstance(paths, list):
            row[name] = list(_saved(paths, number, name, opener, done))
        elif isinstance(paths, str):
            row[name] = next(_saved([paths], number, name, opener, done))


def _saved(paths: list[Any], number: int, kind: str, opener: OpenMedia, done: Exported) -> Iterator[Any]:
    """The paths, with a file of its own for each stored medium."""
    for position, path in enumerate(paths):
        if not isinstance(path, str) or not path.startswith(STORED):
            yield path
            continue
        try:
            data = opener("", path)
        except FileNotFoundError as error:
            message = f"{path} names a medium of a record, and no record holds it"
            raise RowError.single(f"{kind.capitalize()}Missing", message, kind) from error
        file = done.folder / f"{number // 1000:04d}" / f"{number}-{position}.{_suffix(data, path, kind)}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        done.media += 1
        yield file.relative_to(done.folder.parent).as_posix()


def _suffix(data: bytes, path: str, kind: str) -> str:
    if suffix := stored_suffix(path):
        return suffix
    try:
        with Image.open(BytesIO(data)) as image:
            return _SUFFIXES.get(image.format or "", "jpg")
    except (UnidentifiedImageError, OSError):
        videos = (suffix for start, suffix in _VIDEO_BEGINNINGS.items() if data.startswith(start))
        return "jpg" if kind == "image" else next(videos, "mp4")


def _elsewhere(root: str, relative: str) -> bytes:
    raise FileNotFoundError(f"{root}/{relative}")

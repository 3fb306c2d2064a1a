"""WebDataset tar shards: the members of a sample, by an index of where each starts; nothing is unpacked."""

from __future__ import annotations

import io
import json
import os
import tarfile
from array import array
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from internvl_trainer.artifacts.sources import derived_file
from internvl_trainer.errors import UserError

from ..diagnostics import RowError
from ..media_names import PICTURES, STORED, VIDEOS
from .media_fields import MEDIA_NAMES
from .source import find_part, not_utf8, parse_record

_BLOCK = 512
_TEXTS = ("txt", "caption")
_UNREADABLE = ("heic", "heif", "jxl", "svg", "pdf", "psd", "ogv", "3gp", "npy", "npz", "pth", "wav", "mp3", "flac")


class WebDatasetRecords:
    """Samples of one or several shards, as one sequence; `line_number` counts samples from 1.

    A sample is the neighbouring members of one key (the name up to its first dot). Its `.json` is the record, `.txt`
    its caption, and its pictures or video take the place of those that the record names.
    """

    def __init__(self, shards: list[Path]) -> None:
        self.path, self.shards = shards[0], shards
        self._indexes = [_Shard(shard) for shard in shards]
        self._ends = list(accumulate(len(index) for index in self._indexes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> bytes:
        """The record as JSON. Raises RowError without `.json` and `.txt`, and where all media are of unread formats."""
        shard, sample = self._find(row)
        record: dict[str, Any] | None = None
        media: dict[str, list[str]] = {"image": [], "video": []}
        unread: list[str] = []
        for position, (suffix, start, size) in enumerate(shard.members(sample)):
            extension = suffix.rpartition(".")[2]
            if extension in PICTURES or extension in VIDEOS:
                kind = "image" if extension in PICTURES else "video"
                media[kind].append(f"{STORED}{row + 1}/{suffix}/{position}")
            elif extension == "json":
                text = shard.read(start, size)
                parsed = parse_record(text)
                if parsed is None:
                    return text
                record = {**(record or {}), **parsed}
            elif extension in _TEXTS:
                record = {"caption": _decode(shard.read(start, size), suffix), **(record or {})}
            elif extension in _UNREADABLE:
                unread.append(suffix)
        if unread and not any(media.values()):
            message = "the member is of a format that is not read; convert pictures to PNG and videos to MP4"
            raise RowError.single("FieldUnsupported", message, unread[0])
        if record is None:
            raise RowError.single("ConversationsMissing", "the sample has neither a .json nor a .txt member", "json")
        return json.dumps(_with_media(record, media), ensure_ascii=False).encode(errors="surrogatepass")

    def line_number(self, row: int) -> int:
        """1-based number of the sample, over all shards."""
        return row + 1

    def stored_media(self, path: str) -> bytes:
        """The bytes of a member. Raises FileNotFoundError where there is none."""
        number, _, rest = path.removeprefix(STORED).partition("/")
        try:
            shard, sample = self._find(int(number) - 1)
            _, start, size = shard.members(sample)[int(rest.rpartition("/")[2])]
        except (IndexError, ValueError) as error:
            raise FileNotFoundError(path) from error
        return shard.read(start, size)

    def _find(self, row: int) -> tuple[_Shard, int]:
        shard, sample = find_part(self._ends, row)
        return self._indexes[shard], sample


def _decode(text: bytes, suffix: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(error, suffix) from error


def _with_media(record: dict[str, Any], media: dict[str, list[str]]) -> dict[str, Any]:
    if not any(media.values()):
        return record
    kept = {name: value for name, value in record.items() if name not in MEDIA_NAMES}
    for kind, paths in media.items():
        if paths:
            kept[kind] = paths[0] if len(paths) == 1 else paths
    return kept


class _Shard:
    """Where the members of a tar's samples are; the index is made once, kept in the cache and mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        index = derived_file(path, "samples of a tar", lambda target: _write_index(path, target))
        members = np.load(index, mmap_mode="r")
        self._members = members[:, :3]  # (n, 3) int64 header, start and size of each member
        self._starts = np.flatnonzero(members[:, 3])  # (samples,) first member of each

    def __len__(self) -> int:
        return len(self._starts)

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """(name after the key, start, size) of each member of a sample."""
        last = self._starts[sample + 1] if sample + 1 < len(self) else len(self._members)
        rows = self._members[self._starts[sample] : last].tolist()
        return [(_split(self._name(header, start))[1], start, size) for header, start, size in rows]

    def read(self, start: int, size: int) -> bytes:
        """Bytes of the shard."""
        with self.path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, start)

    def _name(self, header: int, start: int) -> str:
        """A member's name; its long form is in the headers before its own."""
        blocks = self.read(header, start - header)
        if len(blocks) == _BLOCK:
            return tarfile.TarInfo.frombuf(blocks, "utf-8", "surrogateescape").name
        with tarfile.open(fileobj=io.BytesIO(blocks), mode="r:") as headers:
            info = headers.next()
        return info.name if info else ""


def _write_index(path: Path, target: Path) -> None:
    """(n, 4) int64 header, start and size of each member, and 1 where a sample begins."""
    members, key = array("q"), None
    try:
        with tarfile.open(path, "r:") as shard:
            for info in shard:
                shard.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                found, suffix = _split(info.name)
                if not info.isreg() or info.issparse() or not suffix or os.path.basename(found) == "":
                    continue
                members.extend((info.offset, info.offset_data, info.size, int(found != key)))
                key = found
    except tarfile.TarError as error:
        raise UserError("AnnotationUnreadable", f"not a whole tar file: {error}", str(path)) from error
    with target.open("wb") as file:
        np.save(file, np.frombuffer(members, np.int64).reshape(-1, 4))


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member: a/b.left.jpg is (a/b, left.jpg), in lower case."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()

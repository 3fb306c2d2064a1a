"""Archives as a data root: members are read one at a time, and no member is ever written under its own name.

A zip is read through its central directory, a tar through an index made in one pass; a compressed tar is decompressed
once, into the cache. Links, encrypted members and names that leave the archive are refused.
"""

from __future__ import annotations

import gzip
import json
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

from internvl_trainer.artifacts.storage import inside
from internvl_trainer.errors import BadFile, UserError
from internvl_trainer.git_lfs import is_pointer

_ZIP, _TAR, _PACKED_TAR = (".zip",), (".tar",), (".tar.gz", ".tgz")
_CHUNK = 1 << 20
# A member of more than this, or that unpacks to so many times its size, is a bomb or a mistake. Videos stay below.
_LARGEST_MEMBER = 1 << 30
_SUSPECT_SIZE, _LARGEST_RATIO = 64 << 20, 200


# What zipfile and tarfile raise for bytes that are no archive; both let errors of parsing through.
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, ValueError, struct.error, NotImplementedError,
    OverflowError, IndexError, OSError, RecursionError,
)  # fmt: skip


class Archive(Protocol):
    """Members by relative name."""

    def read(self, name: str) -> bytes:
        """The bytes of a member. Raises FileNotFoundError, or BadFile for one that must not be read."""
        ...

    def names(self) -> Iterator[str]:
        """Names of the members that can be read."""
        ...


def is_archive(uri: str) -> bool:
    """Whether a root's URI names an archive; a query (of a signed URL) does not count."""
    return uri.partition("?")[0].rstrip("/").lower().endswith((*_ZIP, *_TAR, *_PACKED_TAR))


def archives_in(root: str) -> Iterator[tuple[str, str]]:
    """Each archive that a root may name, and the folder in it: `a.zip/photos` gives (a.zip, photos/)."""
    path, mark, query = root.partition("?")
    parts = path.rstrip("/").split("/")
    for end in range(_parts_of_place(path) + 1, len(parts) + 1):
        archive = "/".join(parts[:end])
        if is_archive(archive):
            yield f"{archive}{mark}{query}", "".join(f"{part}/" for part in parts[end:])


def _parts_of_place(path: str) -> int:
    """Number of parts that name a bucket, claim, host or repository, which may end like an archive."""
    if path.startswith("hf://"):
        return 5 if path.startswith("hf://datasets/") else 4
    return 3 if "://" in path else 0


def is_packed_tar(uri: str) -> bool:
    """Whether it must be decompressed before members can be read."""
    return uri.partition("?")[0].lower().endswith(_PACKED_TAR)


def open_archive(path: Path, uri: str, index: Callable[[Callable[[Path], None]], Path]) -> Archive:
    """The archive at `path`, called `uri` in messages. Raises UserError for a file that is no archive.

    Args:
        index: stores a tar's index; it gets the function that writes one and returns the stored index's path.
    """
    try:
        if uri.lower().endswith(_ZIP):
            return ZipArchive(path)
        return TarArchive(path, index(partial(_write_index, path)))
    except _BROKEN as error:
        raise UserError("ArchiveBroken", f"cannot be read as an archive ({error}); {_advice(path)}", uri) from error


def decompress(packed: Path, target: Path, uri: str) -> None:
    """Unpack a .tar.gz to a .tar. Raises UserError when it is broken or suspiciously well compressed."""
    bound = max(_SUSPECT_SIZE, _LARGEST_RATIO * packed.stat().st_size)
    written = 0
    try:
        with gzip.open(packed) as source, target.open("wb") as out:
            while chunk := source.read(_CHUNK):
                written += len(chunk)
                if written > bound:
                    raise UserError(
                        "ArchiveUnsafe", f"unpacks to over {_LARGEST_RATIO} times its size; is it a bomb?", uri
                    )
                out.write(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError("ArchiveBroken", f"cannot be unpacked ({error}); {_advice(packed)}", uri) from error


def _advice(path: Path) -> str:
    """What to do about a file that is no archive."""
    return "it is a git-lfs pointer: run `git lfs pull` where it comes from" if is_pointer(path) else "is it complete?"


class ZipArchive:
    """Random access over the central directory. One for each process: a fork would share the file's position."""

    def __init__(self, path: Path) -> None:
        self._file = zipfile.ZipFile(path)
        self._members = {_plain(info.filename): info for info in self._file.infolist() if not info.is_dir()}

    def read(self, name: str) -> bytes:
        info = self._members.get(name)
        if info is None:
            raise FileNotFoundError(name)
        mode = info.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise BadFile("MemberRefused", f"{name} is a link or a device in its archive; store the file itself")
        if info.flag_bits & 1:
            raise BadFile("MemberRefused", f"{name} is encrypted in its archive; store it without a password")
        _check_size(name, info.file_size, info.compress_size)
        try:
            return self._file.read(info)
        except (*_BROKEN, RuntimeError) as error:
            raise BadFile("MemberBroken", f"{name} cannot be unpacked ({error})") from error

    def names(self) -> Iterator[str]:
        return _readable(self._members)


class TarArchive:
    """Random access through an index of where each file starts, made in one pass; safe in forked processes."""

    def __init__(self, path: Path, index: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._members: dict[str, tuple[int, int] | None] = json.loads(index.read_bytes())  # None: a link or a device

    def read(self, name: str) -> bytes:
        if name not in self._members:
            raise FileNotFoundError(name)
        member = self._members[name]
        if member is None:
            raise BadFile("MemberRefused", f"{name} is a link or a device in its archive; store the file itself")
        offset, size = member
        _check_size(name, size, size)
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise BadFile("MemberBroken", f"{name} is cut short in its archive")
        return data

    def names(self) -> Iterator[str]:
        return _readable(self._members)


def _readable(members: Iterable[str]) -> Iterator[str]:
    return (name for name in members if not name.startswith("\0"))


def _write_index(path: Path, target: Path) -> None:
    """JSON: member to [offset, size], or to null when it must not be read."""
    target.write_text(json.dumps(dict(_scan(path))))


def _scan(path: Path) -> Iterator[tuple[str, tuple[int, int] | None]]:
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            if not info.isdir():
                plain = info.isreg() and not info.issparse()
                yield _plain(info.name), (info.offset_data, info.size) if plain else None


def _plain(name: str) -> str:
    """A member's name as rows write it. A name that leaves the archive gets a key that no row can have."""
    try:
        return inside(name, field="archive")
    except UserError:
        return f"\0{name}"


def _check_size(name: str, size: int, packed: int) -> None:
    if size > _LARGEST_MEMBER or (size > _SUSPECT_SIZE and size > _LARGEST_RATIO * max(1, packed)):
        raise BadFile("MemberRefused", f"{name} unpacks from {packed} to {size} bytes; is it a bomb?")

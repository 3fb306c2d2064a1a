"""A bounded disk cache that several processes of a node share: entries are made once and thrown out oldest first.

Layout: `entries/<digest>` (a file or a folder), `partial/<digest>` while a folder is made, and two locks of a folder:
`locks/<digest>`, shared by its users for as long as they live, and `locks/<digest>.making`. They are two, because
flock(2) does not turn a shared lock into an exclusive one in one step: of two processes that found no entry, one would
make it and keep it in use, and the other would wait for that use to end.
An entry is named by a digest of where it came from and of its etag, so that a changed source is another entry.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from internvl_api.constants import CACHE_PATH

_GIB = 1 << 30
_DEFAULT_GIB = 100
_ABANDONED_SECONDS = 3 * 24 * 3600
_MAKING = ".making"


class Cache:
    """Entries under `root`, together at most about `limit` bytes (checked after each twentieth of it was added)."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self._limit = root, limit
        self._added = 0
        self._held: dict[str, int] = {}  # folder entries in use by this process: digest to the lock's descriptor
        self._mutex = threading.Lock()
        for name in ("entries", "locks", "partial"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def bytes_of(self, name: str, load: Callable[[], bytes]) -> bytes:
        """The content named `name`; `load` is asked only when it is not here."""
        path = self.root / "entries" / digest_of(name)
        try:
            os.utime(path)
            return path.read_bytes()
        except FileNotFoundError:
            data = load()
            self._place(path, lambda temporary: temporary.write_bytes(data))
            return data

    def file(self, name: str, make: Callable[[Path], object]) -> Path:
        """The path of the file named `name`; `make` writes it to the path it is given when it is not here."""

        def make_in(folder: Path) -> None:
            make(folder / "content")

        return self.folder(name, make_in) / "content"

    def folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder named `name`, kept from eviction while this process lives.

        `make` fills the folder it is given. After a failure the next caller gets the same half-filled folder, so
        that a download can go on; two processes never make the same entry at once.
        """
        digest = digest_of(name)
        entry, descriptor = self.root / "entries" / digest, self._open_lock(digest)
        try:
            while not self._is_there(entry, descriptor):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                self._make(digest, descriptor, make)
            os.utime(entry)
        except BaseException:
            os.close(descriptor)
            raise
        with self._mutex:
            if (earlier := self._held.pop(digest, None)) is not None:
                os.close(earlier)
            self._held[digest] = descriptor
        return entry

    def _make(self, digest: str, descriptor: int, make: Callable[[Path], object]) -> None:
        """Make the entry, or wait until the process that makes it is done."""
        entry, partial = self.root / "entries" / digest, self.root / "partial" / digest
        making = self._open_lock(digest + _MAKING)
        try:
            fcntl.flock(making, fcntl.LOCK_EX)
            if not entry.exists():  # nobody made it while this process waited
                partial.mkdir(parents=True, exist_ok=True)
                make(partial)
                os.replace(partial, entry)
                fcntl.flock(descriptor, fcntl.LOCK_SH)  # in use, before room is made for it
                self._count(_size(entry))
        finally:
            os.close(making)

    def _open_lock(self, name: str) -> int:
        return os.open(self.root / "locks" / name, os.O_RDWR | os.O_CREAT, 0o666)

    def _is_there(self, entry: Path, descriptor: int) -> bool:
        """With a shared lock taken: from here on nobody throws the entry out."""
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return entry.exists()

    def _place(self, path: Path, write: Callable[[Path], object]) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.root / "partial")
        os.close(handle)
        try:
            write(Path(temporary))
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._count(path.stat().st_size)

    def _count(self, size: int) -> None:
        with self._mutex:
            self._added += size
            if self._added * 20 < self._limit:
                return
            self._added = 0
        self.evict()

    def evict(self) -> None:
        """Delete the entries that were not used for longest until the rest fits; entries in use stay."""
        self._remove_abandoned()
        entries = [(entry.stat().st_mtime, entry) for entry in (self.root / "entries").iterdir()]
        sizes = {entry: _size(entry) for _, entry in entries}
        excess = sum(sizes.values()) - self._limit
        for _, entry in sorted(entries):
            if excess <= 0:
                return
            if self._delete(entry, lock=entry.name):
                excess -= sizes[entry]

    def _remove_abandoned(self) -> None:
        """What a killed download left, and nobody has gone on with for days."""
        for partial in (self.root / "partial").iterdir():
            try:
                abandoned = time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS
            except FileNotFoundError:  # it was finished meanwhile
                continue
            if abandoned:
                self._delete(partial, lock=partial.name + _MAKING)

    def _delete(self, entry: Path, *, lock: str) -> bool:
        """False for a folder that is in use, or being made."""
        if not entry.is_dir():
            entry.unlink(missing_ok=True)
            return True
        descriptor = self._open_lock(lock)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry, ignore_errors=True)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True


def open_cache() -> Cache:
    """The cache of this process: $INTERNVL_CACHE, else /cache where it can be written, else a folder of the user's.

    $INTERNVL_CACHE_GIB bounds it (100 unless told).
    """
    limit = int(float(os.environ.get("INTERNVL_CACHE_GIB", _DEFAULT_GIB)) * _GIB)
    return Cache(cache_root(), limit)


def cache_root() -> Path:
    """Where the cache is; see open_cache."""
    if chosen := os.environ.get("INTERNVL_CACHE"):
        return Path(chosen)
    if os.access(CACHE_PATH, os.W_OK):
        return Path(CACHE_PATH)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "internvl-trainer"


def digest_of(name: str) -> str:
    """The file name an entry has."""
    return hashlib.sha256(name.encode()).hexdigest()[:40]


def _size(entry: Path) -> int:
    try:
        if entry.is_dir():
            return sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
        return entry.stat().st_size
    except FileNotFoundError:  # another process threw it out
        return 0

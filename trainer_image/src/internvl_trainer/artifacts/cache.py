"""A bounded disk cache that several processes of a node share: entries are made once and thrown out oldest first.

Layout: `entries/<digest>` (a file or a folder), `records/<digest>` (the sha256 of each file of a folder),
`partial/<digest>` while a folder is made, `locks/added` (how many bytes were added since a process last made room), and
two locks of a folder: `locks/<digest>`, shared by its users for as long as they live, and `locks/<digest>.making`. They
are two, because flock(2) does not turn a shared lock into an exclusive one in one step: of two processes that found no
entry, one would make it and keep it in use, and the other would wait for that use to end.
An entry is named by a digest of the run's namespace, of where it came from and of its etag, so that a changed source is
another entry and namespaces share none. Whoever can write to the folder can change an entry, so none is used unchecked:
media are stored after their sha256, and the user of a folder gives a check of its files against their source.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from internvl_api.constants import CACHE_PATH, DEFAULT_CACHE_GIB, ENV_CACHE, ENV_CACHE_GIB

from internvl_trainer.errors import UserError

_GIB = 1 << 30
_ABANDONED_SECONDS = 3 * 24 * 3600
_MAKING = ".making"
_DIGEST_BYTES = 32
_COUNT_BYTES = 8
ENV_NAMESPACE = "INTERNVL_CACHE_NAMESPACE"
logger = logging.getLogger(__name__)


class Cache:
    """Entries under `root`. Those that no process uses have at most about `limit` bytes together.

    A model in use may be larger than the limit; counting it would evict every picture. The limit is checked whenever
    all processes together have added a twentieth of it.
    """

    def __init__(self, root: Path, limit: int, namespace: str = "") -> None:
        self.root, self._limit, self._namespace = root, limit, namespace
        self._checked: set[str] = set()  # folder entries that this process made or checked
        self._held: dict[str, int] = {}  # folder entries in use by this process: digest to the lock's descriptor
        self._mutex = threading.Lock()
        for name in ("entries", "locks", "partial", "records"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def bytes_of(self, name: str, load: Callable[[], bytes]) -> bytes:
        """The content named `name`; `load` is asked only when it is not here."""
        path = self.root / "entries" / self._digest(name)
        try:
            os.utime(path)
            stored = path.read_bytes()
            digest, data = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
            if hashlib.sha256(data).digest() == digest:
                return data
            logger.warning("the cached file %s was changed; it is loaded again", path)
        except FileNotFoundError:
            pass
        data = load()
        self._place(path, lambda temporary: temporary.write_bytes(hashlib.sha256(data).digest() + data))
        return data

    def _digest(self, name: str) -> str:
        return digest_of(f"{self._namespace}\n{name}" if self._namespace else name)

    def has(self, name: str) -> bool:
        """Whether there is a folder of that name; its files are not checked yet."""
        return (self.root / "entries" / self._digest(name)).is_dir()

    def file(self, name: str, make: Callable[[Path], object]) -> Path:
        """The path of the file named `name`; `make` writes it to the path it is given when it is not here."""

        def make_in(folder: Path) -> None:
            make(folder / "content")

        return self.folder(name, make_in) / "content"

    def folder(
        self,
        name: str,
        make: Callable[[Path], object],
        is_intact: Callable[[Path], bool] | None = None,
        while_another_makes: Callable[[Path], AbstractContextManager[object]] = nullcontext,
    ) -> Path:
        """The folder named `name`, kept from eviction while this process lives.

        An entry that was there is used only if its files have the digests that were recorded when it was made and
        `is_intact` agrees; else it is made again. Each process checks an entry once.

        `make` fills the folder it is given. After a failure the next caller gets the same half-filled folder, so
        that a download can go on; two processes never make the same entry at once. While one waits for another,
        `while_another_makes` is entered with the folder that the other one fills.
        """
        digest = self._digest(name)
        entry, descriptor = self.root / "entries" / digest, self._open_lock(digest)
        try:
            while not self._lock_entry(entry, descriptor) or not self._keep_if_intact(digest, entry, is_intact):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                self._make(digest, descriptor, make, while_another_makes)
            os.utime(entry)
        except BaseException:
            os.close(descriptor)
            raise
        with self._mutex:
            if (earlier := self._held.pop(digest, None)) is not None:
                os.close(earlier)
            self._held[digest] = descriptor
        return entry

    def _make(
        self,
        digest: str,
        descriptor: int,
        make: Callable[[Path], object],
        while_another_makes: Callable[[Path], AbstractContextManager[object]],
    ) -> None:
        """Make the entry, or wait until the process that makes it is done."""
        entry, partial = self.root / "entries" / digest, self.root / "partial" / digest
        making = self._open_lock(digest + _MAKING)
        try:
            try:
                fcntl.flock(making, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with while_another_makes(partial):
                    fcntl.flock(making, fcntl.LOCK_EX)
            if not entry.exists():  # nobody made it while this process waited
                partial.mkdir(parents=True, exist_ok=True)
                make(partial)
                record = self.root / "records" / digest
                self._place(record, lambda path: path.write_text(json.dumps(_digests(partial)), encoding="utf-8"))
                os.replace(partial, entry)
                self._checked.add(digest)
                fcntl.flock(descriptor, fcntl.LOCK_SH)  # in use, before room is made for it
                self._count(_size(entry))
        finally:
            os.close(making)

    def _keep_if_intact(self, digest: str, entry: Path, is_intact: Callable[[Path], bool] | None) -> bool:
        """True for an unchanged entry; a changed one is moved to partial/, where eviction finds it."""
        if digest in self._checked:
            return True
        if _matches(self.root / "records" / digest, entry) and (is_intact is None or is_intact(entry)):
            self._checked.add(digest)
            return True
        logger.warning("the cached folder %s was changed; it is loaded again", entry)
        with contextlib.suppress(FileNotFoundError):  # another process moved it
            os.replace(entry, self.root / "partial" / f"changed-{uuid.uuid4().hex}")
        return False

    def _open_lock(self, name: str) -> int:
        return os.open(self.root / "locks" / name, os.O_RDWR | os.O_CREAT, 0o666)

    def _lock_entry(self, entry: Path, descriptor: int) -> bool:
        """Take the shared lock, which keeps the entry from eviction; True when the entry exists."""
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return entry.exists()

    def _place(self, path: Path, write: Callable[[Path], object]) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.root / "partial")
        os.close(handle)
        try:
            write(Path(temporary))
            size = Path(temporary).stat().st_size  # once it is an entry, another process may evict it
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._count(size)

    def _count(self, size: int) -> None:
        """Add to what all processes have added since one of them last made room; make room when it is much."""
        descriptor = self._open_lock("added")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            added = int.from_bytes(os.pread(descriptor, _COUNT_BYTES, 0)) + size
            is_due = added * 20 >= self._limit
            os.pwrite(descriptor, (0 if is_due else added).to_bytes(_COUNT_BYTES), 0)
        finally:
            os.close(descriptor)
        if is_due:
            self.evict()

    def evict(self) -> None:
        """Delete the entries that were not used for longest until the rest fits; entries in use stay, uncounted."""
        self._remove_abandoned()
        entries = [(used, entry) for used, entry in self._by_use() if not self._is_in_use(entry)]
        sizes = {entry: _size(entry) for _, entry in entries}
        excess = sum(sizes.values()) - self._limit
        for _, entry in entries:
            if excess <= 0:
                return
            if self._delete(entry, lock=entry.name):
                excess -= sizes[entry]

    def _by_use(self) -> list[tuple[float, Path]]:
        """When each entry was last used, and its path; the one that was not used for longest comes first."""
        found = []
        for entry in (self.root / "entries").iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process evicts too
                found.append((entry.stat().st_mtime, entry))
        return sorted(found)

    def _remove_abandoned(self) -> None:
        """Delete what a killed download left and no process has continued for days."""
        for partial in (self.root / "partial").iterdir():
            try:
                abandoned = time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS
            except FileNotFoundError:  # it was finished meanwhile
                continue
            if abandoned:
                self._delete(partial, lock=partial.name + _MAKING)

    def _is_in_use(self, entry: Path) -> bool:
        """Whether a process holds a folder entry."""
        if not entry.is_dir():
            return False
        descriptor = self._open_lock(entry.name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _delete(self, entry: Path, *, lock: str) -> bool:
        """Delete an entry; False for a folder that is in use or being made."""
        if not entry.is_dir():
            entry.unlink(missing_ok=True)
            return True
        descriptor = self._open_lock(lock)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry, ignore_errors=True)
            (self.root / "records" / entry.name).unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True


def open_cache() -> Cache:
    """The cache of this process: $INTERNVL_CACHE, else /cache where it can be written, else a folder of the user's.

    $INTERNVL_CACHE_GIB bounds it (DEFAULT_CACHE_GIB unless told). Raises UserError when that is no amount.
    """
    limit = _limit()
    root = cache_root()
    if os.path.ismount(CACHE_PATH) and not os.access(CACHE_PATH, os.W_OK):
        logger.warning("uid %d cannot write to %s; caching in %s", os.getuid(), CACHE_PATH, root)
    return Cache(root, limit, os.environ.get(ENV_NAMESPACE, ""))


def _limit() -> int:
    """Bytes that the cache may have."""
    found = os.environ.get(ENV_CACHE_GIB, str(DEFAULT_CACHE_GIB))
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", found) and float(found) > 0:
        return int(float(found) * _GIB)
    text = (
        f"found {found[:80]!r}, expected GiB above 0, such as {DEFAULT_CACHE_GIB}; correct it, or remove the variable"
    )
    raise UserError("InvalidEnvironment", text, ENV_CACHE_GIB)


def cache_root() -> Path:
    """Where the cache is; see open_cache."""
    if chosen := os.environ.get(ENV_CACHE):
        return Path(chosen)
    if os.access(CACHE_PATH, os.W_OK):
        return Path(CACHE_PATH)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "internvl-trainer"


def digest_of(name: str) -> str:
    """The file name of an entry."""
    return hashlib.sha256(name.encode()).hexdigest()[:40]


def _size(entry: Path) -> int:
    try:
        if entry.is_dir():
            return sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
        return entry.stat().st_size
    except FileNotFoundError:  # another process threw it out
        return 0


def _digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file by relative name; "link" for a link, so that a folder with links never matches."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = "link" if path.is_symlink() else hashlib.file_digest(file, "sha256").hexdigest()
            found[path.relative_to(folder).as_posix()] = digest
    return found


def _matches(record: Path, entry: Path) -> bool:
    """Whether an entry's files have the recorded digests."""
    try:
        digests = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(digests, dict) and "link" not in digests.values() and digests == _digests(entry)

"""Storage: one interface over a folder and over object stores, rooted at a URI."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, Protocol, TypeVar

from internvl_api.address import OBJECT_STORES
from tenacity import before_sleep_log, retry, retry_if_exception_type, stop_after_delay, wait_exponential

from internvl_trainer.artifacts.links import check_inside
from internvl_trainer.errors import AccessDenied, Unavailable, UserError

if TYPE_CHECKING:
    from internvl_trainer.artifacts.object_storage import ObjectStorage

logger = logging.getLogger(__name__)

_UNFINISHED = ".writing-"  # how the name of a file begins while it is written
_TRIES = 5  # to write a file into a folder that another process deletes at the same time
_LOCK_SECONDS = 10.0  # for another process to finish one small write
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
P = ParamSpec("P")
Result = TypeVar("Result")


def patiently(seconds: float) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Decorator: retry while storage is unavailable, for that many seconds; then raise the last Unavailable."""
    return retry(
        retry=retry_if_exception_type(Unavailable),
        wait=wait_exponential(max=30),
        stop=stop_after_delay(seconds),
        before_sleep=before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )


# For checkpoints and results of training: ending the attempt would cost more GPU time than the wait.
persistently = patiently(600)


class StoredFile(NamedTuple):
    """A file under a storage's root. `key` is relative to it; `etag` changes when the content does."""

    key: str
    size: int
    etag: str


class Tagged(NamedTuple):
    """A small file's content, and a tag that only this content has."""

    data: bytes
    tag: str


class ConditionsUnsupported(Exception):
    """This server or file system cannot write on a condition."""


class Storage(Protocol):
    """Files under one URI. Keys are relative, with `/`. Every failure is a UserError naming the URI.

    `download` raises UserError with reason `NotFound` where there is no such key; `upload`, `write` and `copy`
    never leave a half-written file under its key.
    """

    uri: str

    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        """Files whose key starts with `prefix`, in the order of their keys."""
        ...

    def stat(self, key: str) -> StoredFile | None:
        """The file of that key, or None."""
        ...

    def modified(self, key: str) -> float:
        """When the file was written, in seconds of the server's clock. Raises UserError `NotFound`."""
        ...

    def read(self, key: str) -> bytes:
        """The whole of a small file."""
        ...

    def read_start(self, key: str, length: int) -> bytes:
        """The first `length` bytes of a file, fewer of a shorter one."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Stream a file to `path`, whose folder exists."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Store a small file."""
        ...

    def read_tagged(self, key: str) -> Tagged | None:
        """The content of a small file with the tag that `replace` expects; None where there is none."""
        ...

    def replace(self, key: str, data: bytes, *, expected: str | None) -> str | None:
        """Store a small file if its tag is still `expected` (None: if there is none); its new tag.

        None when another writer was first. Raises ConditionsUnsupported.
        """
        ...

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        """Stream `path` to a file; the server stores `sha256` (hex) with it where it can."""
        ...

    def copy(self, source: str, key: str) -> None:
        """Duplicate one file of this storage, on the server or as a hard link where it can."""
        ...

    def has_content(self, key: str, size: int, sha256: str, *, like: str | None = None) -> bool:
        """Whether the file exists with this content (`size` in bytes, `sha256` in hex).

        It is read back only where the server's checksums cannot decide. `like` is the key of a file with that
        content, which this one was copied from: large files are compared with it.
        """
        ...

    def drop_unfinished(self, prefix: str) -> None:
        """Delete partial writes of killed processes under `prefix`; nobody else may be writing there."""
        ...

    def delete(self, prefix: str) -> None:
        """Delete every file whose key starts with `prefix`; none is no error."""
        ...


def open_storage(uri: str, *, field: str) -> Storage:
    """The storage rooted at `uri`: of an object store, pvc://claim/path or a path. `field` is named in errors."""
    if uri.startswith(OBJECT_STORES):
        return open_object_storage(uri, field=field)
    return FolderStorage(local_path(uri, field=field), field=field)


def open_object_storage(uri: str, *, field: str) -> ObjectStorage:
    """The storage rooted at an address of an object store. Only its own client is imported."""
    if uri.startswith("gs://"):
        from internvl_trainer.artifacts.gcs import GCSStorage

        return GCSStorage(uri, field=field)
    if uri.startswith("az://"):
        from internvl_trainer.artifacts.azure import AzureStorage

        return AzureStorage(uri, field=field)
    from internvl_trainer.artifacts.s3 import S3Storage

    return S3Storage(uri, field=field)


def local_path(uri: str, *, field: str) -> Path:
    """The path of a pvc:// URI (mounted under /pvc) or of a plain one. Raises UserError for other schemes."""
    if uri.startswith("pvc://"):
        return Path("/pvc") / inside(uri.removeprefix("pvc://"), field=field)
    if "://" in uri:
        scheme = uri.partition("://")[0]
        raise UserError(
            "UnsupportedSource",
            f"found {uri!r}: {scheme}:// cannot be used here; use {', '.join(OBJECT_STORES)}, pvc:// or a path",
            field,
        )
    return Path(uri)


def inside(relative: str, *, field: str) -> str:
    """`relative` without `.` and empty parts. Raises UserError when it would leave its root."""
    parts = [part for part in relative.replace("\\", "/").split("/") if part not in ("", ".")]
    if relative.startswith("/") or ".." in parts:
        raise UserError(
            "PathOutsideRoot", f"found {relative!r}, which leaves its root; use a relative path without '..'", field
        )
    return "/".join(parts)


def unless_absent(read: Callable[[], Result]) -> Result | None:
    """What `read` returns; None where it raises UserError `NotFound`."""
    try:
        return read()
    except UserError as error:
        if error.reason == "NotFound":
            return None
        raise


def is_full(error: OSError) -> bool:
    """Whether the error says that a disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Within the block, no other process has this lock; the kernel frees it when a process dies.

    Raises ConditionsUnsupported where the file system has no locks.
    """
    limit = time.monotonic() + _LOCK_SECONDS
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    raise ConditionsUnsupported(f"{path.parent} has no file locks ({error.strerror})") from error
                if time.monotonic() > limit:
                    raise
            time.sleep(0.02)
        yield  # closing the file unlocks it


def _replace(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new file, and put it in the place of `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=_UNFINISHED)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class FolderStorage:
    """Files of one folder; writing is a rename, so that a reader never sees half a file."""

    def __init__(self, root: Path, *, field: str) -> None:
        self.uri, self._root, self._field = str(root), root, field

    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        folder = self._root / prefix.rpartition("/")[0]
        # Unlike rglob, os.walk leaves out a folder that another process deletes meanwhile.
        paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
        found = (path.relative_to(self._root).as_posix() for path in paths if path.is_file())
        for key in sorted(found):
            if key.startswith(prefix) and (stored := self.stat(key)):
                yield stored

    def stat(self, key: str) -> StoredFile | None:
        path = self._path(key)
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._failure(error, key) from error
        return StoredFile(key, status.st_size, f"{status.st_mtime_ns}-{status.st_size}") if path.is_file() else None

    def modified(self, key: str) -> float:
        try:
            return self._path(key).stat().st_mtime
        except OSError as error:
            raise self._failure(error, key) from error

    def read(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except OSError as error:
            raise self._failure(error, key) from error

    def read_start(self, key: str, length: int) -> bytes:
        try:
            with self._path(key).open("rb") as file:
                return file.read(length)
        except OSError as error:
            raise self._failure(error, key) from error

    def download(self, key: str, path: Path) -> None:
        try:
            shutil.copyfile(self._path(key), path)
        except OSError as error:
            if is_full(error):  # the disk of `path`; the caller names it
                raise
            raise self._failure(error, key) from error

    def write(self, key: str, data: bytes) -> None:
        self._store(key, lambda path: path.write_bytes(data))

    def read_tagged(self, key: str) -> Tagged | None:
        data = unless_absent(lambda: self.read(key))
        return None if data is None else Tagged(data, hashlib.sha256(data).hexdigest())

    def replace(self, key: str, data: bytes, *, expected: str | None) -> str | None:
        target = self._path(key)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target.with_suffix(".lock")):
                found = self.read_tagged(key)
                if (found.tag if found else None) != expected:
                    return None
                self._store(key, lambda path: _write_durably(path, data))
        except OSError as error:
            raise self._failure(error, key) from error
        return hashlib.sha256(data).hexdigest()

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        self._store(key, lambda target: shutil.copyfile(path, target))

    def copy(self, source: str, key: str) -> None:
        origin, target = self._path(source), self._path(key)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            os.link(origin, target)
        except OSError:  # no hard links here, or an error that copying will report
            self.upload(origin, key)

    def has_content(self, key: str, size: int, sha256: str, *, like: str | None = None) -> bool:
        found = self.stat(key)
        if found is None or found.size != size:
            return False
        try:
            return sha256_of(self._path(key)) == sha256  # a file system stores no checksums
        except OSError as error:
            raise self._failure(error, key) from error

    def drop_unfinished(self, prefix: str) -> None:
        for stored in list(self.list(prefix)):
            if Path(stored.key).name.startswith(_UNFINISHED):
                self._path(stored.key).unlink(missing_ok=True)

    def delete(self, prefix: str) -> None:
        for stored in list(self.list(prefix)):
            path = self._path(stored.key)
            path.unlink(missing_ok=True)
            self._remove_empty_parents(path)

    def _path(self, key: str) -> Path:
        path = self._root / inside(key, field=self._field)
        try:
            check_inside(path, self._root)
        except (OSError, RuntimeError) as error:  # a loop of links
            raise UserError("NotFound", f"{path} cannot be followed; remove the link", self._field) from error
        return path

    def _store(self, key: str, write: Callable[[Path], object]) -> None:
        target = self._path(key)
        try:
            for left in reversed(range(_TRIES)):
                try:
                    return _replace(target, write)
                except (FileNotFoundError, FileExistsError):  # another process deletes the folder with all its files
                    if not left:
                        raise
        except OSError as error:
            raise self._failure(error, key) from error

    def _remove_empty_parents(self, path: Path) -> None:
        for parent in path.parents:
            if parent == self._root:
                return
            try:
                parent.rmdir()
            except OSError:  # not empty, also when another process has written there meanwhile
                return

    def _failure(self, error: OSError, key: str) -> UserError:
        place = f"{self.uri}/{key}"
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return UserError("NotFound", f"found no file {place}; check the path", self._field)
        if isinstance(error, PermissionError):
            return AccessDenied("AccessDenied", f"{place}: {error.strerror}; check the owner and mode", self._field)
        if is_full(error):
            return Unavailable(
                "DiskFull", f"{place}: {error.strerror}; free some space there; stored files are kept", self._field
            )
        return Unavailable("StorageUnavailable", f"{place}: {error.strerror or error}", self._field)

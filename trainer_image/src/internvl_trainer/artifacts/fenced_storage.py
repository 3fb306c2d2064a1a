"""Storage of an output that accepts writes only while this process holds the output's lease."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from internvl_trainer.artifacts.lease_record import parse_lease
from internvl_trainer.artifacts.output_layout import LEASE_FILE
from internvl_trainer.artifacts.output_lease import OutputLease
from internvl_trainer.artifacts.storage import Storage, StoredFile, Tagged
from internvl_trainer.errors import AccessDenied, LeaseLost, Unavailable, UserError
from internvl_trainer.signals import StopRequested

logger = logging.getLogger(__name__)

_RELEASE_SECONDS = 5.0  # a pod that was told to stop has little time


class FencedStorage:
    """`storage`, with the lease confirmed before each request that changes something. Raises LeaseLost.

    Results of `list` are as old as the call: a deletion names only files that were there under this process's lease.
    """

    def __init__(self, storage: Storage, lease: OutputLease) -> None:
        self.uri, self._storage, self._lease = storage.uri, storage, lease

    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        return self._storage.list(prefix)

    def stat(self, key: str) -> StoredFile | None:
        return self._storage.stat(key)

    def modified(self, key: str) -> float:
        return self._storage.modified(key)

    def read(self, key: str) -> bytes:
        return self._storage.read(key)

    def read_start(self, key: str, length: int) -> bytes:
        return self._storage.read_start(key, length)

    def read_tagged(self, key: str) -> Tagged | None:
        return self._storage.read_tagged(key)

    def download(self, key: str, path: Path) -> None:
        self._storage.download(key, path)

    def has_content(self, key: str, size: int, sha256: str, *, like: str | None = None) -> bool:
        return self._storage.has_content(key, size, sha256, like=like)

    def write(self, key: str, data: bytes) -> None:
        self._lease.confirm()
        self._storage.write(key, data)

    def replace(self, key: str, data: bytes, *, expected: str | None) -> str | None:
        self._lease.confirm()
        return self._storage.replace(key, data, expected=expected)

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        self._lease.confirm()
        self._storage.upload(path, key, sha256=sha256)

    def copy(self, source: str, key: str) -> None:
        self._lease.confirm()
        self._storage.copy(source, key)

    def drop_unfinished(self, prefix: str) -> None:
        self._lease.confirm()
        self._storage.drop_unfinished(prefix)

    def delete(self, prefix: str) -> None:
        self._lease.confirm()
        self._storage.delete(prefix)


def check_epoch(storage: Storage, epoch: int | None) -> None:
    """Raise LeaseLost when the output's lease is no longer the one of `epoch`; for ranks that do not hold it.

    `epoch`: None where no rank holds a lease.
    """
    if epoch is None:
        return
    found = storage.read_tagged(LEASE_FILE)
    lease = parse_lease(found.data) if found else None
    if lease is None or lease.epoch != epoch:
        who = lease.owner.describe() if lease else "another writer"
        raise LeaseLost("OutputLeaseLost", f"{who} has taken {storage.uri}; this attempt ends", "spec.output")


@contextmanager
def kept_alive(lease: OutputLease, *, on_loss: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Renew the lease within the block and release it afterwards. Yields a function that marks the run as finished.

    `on_loss` is called once, in another thread, when another holder has taken the lease within the block. A lease that
    cannot be released in a few seconds becomes stale by itself.
    """
    ended, finished = threading.Event(), threading.Event()

    def keep() -> None:
        try:
            while not ended.wait(lease.timing.beat):
                _renew(lease)
        except LeaseLost as error:
            if not ended.is_set():  # else the next stage of this process has taken over from a slow request
                logger.error("%s", error)
                on_loss()
            return
        try:
            lease.release(finished=finished.is_set())
        except UserError as error:
            logger.warning("the output's lease was not released: %s", error)

    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield finished.set
    finally:
        ended.set()
        thread.join(_RELEASE_SECONDS)


@contextmanager
def raising_lease_loss(lease: OutputLease) -> Iterator[None]:
    """Within the block, raise LeaseLost for any error of a process that has lost the lease.

    The loss is the root cause: files may be missing, for example, because the new holder prunes.
    """
    try:
        yield
    except LeaseLost:
        raise
    except StopRequested:
        lease.check()  # without a request: a pod that was told to stop has little time
        raise
    except UserError:
        with suppress(Unavailable, AccessDenied):
            lease.confirm()
        raise


def _renew(lease: OutputLease) -> None:
    """Renew the lease if storage answers. Raises only LeaseLost: each write confirms the lease again."""
    try:
        lease.renew()
    except LeaseLost:
        raise
    except UserError as error:
        logger.warning("the output's lease was not renewed; trying again: %s", error)

"""How fast the disk and object storage of this machine are, and how far the storage's clock is from ours."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time

from internvl_api.quantity import gib

from internvl_trainer.artifacts.storage import Storage, open_storage
from internvl_trainer.artifacts.storage_speed import measure_speed, rate
from internvl_trainer.doctor.machine import Disk, Problem, Transfer
from internvl_trainer.errors import UserError

_CHUNK = 2**20


def lacking_room(megabytes: int) -> str:
    """Why a test file of that many MiB is too large for the temporary folder; empty when it is not.

    Raises OSError when there is no such folder.
    """
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    largest = free // 2 // 2**20
    if megabytes <= largest:
        return ""
    return (
        f"found a test file of {megabytes} MiB, expected at most {largest} MiB: half of the {gib(free)} that "
        f"are free in {folder}"
    )


def measure_disk(megabytes: int) -> Disk | Problem:
    """Write, sync and read back a file in the temporary folder; it has no name there, so that no signal leaves it."""
    folder = tempfile.gettempdir()
    try:
        if lacking := lacking_room(megabytes):
            return Problem(lacking)
        with tempfile.TemporaryFile(dir=folder) as file:
            write = rate(megabytes, lambda: _write(file.fileno(), megabytes))
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read from the disk, not from memory
            read = rate(megabytes, lambda: _read(file.fileno()))
        return Disk(folder, shutil.disk_usage(folder).free, write, read)
    except OSError as error:
        return Problem(f"{folder}: {error.strerror or error}")


def measure_storage(uri: str, megabytes: int) -> Transfer | Problem:
    """Send a file to the storage and receive it; both files are removed."""
    key = f"doctor-{secrets.token_hex(4)}/data"
    try:
        if lacking := lacking_room(megabytes):
            return Problem(f"not measured: {lacking}")
        storage = open_storage(uri, field="storage")
        try:
            speed = measure_speed(storage, key, megabytes)
        finally:
            storage.delete(key)
        return Transfer(uri, speed.write, speed.read, _clock_ahead(storage, f"{key}-now"))
    except UserError as error:
        return Problem(str(error)[:300])
    except OSError as error:
        return Problem(f"{uri}: {error.strerror or error}")


def _clock_ahead(storage: Storage, key: str) -> float:
    """Seconds that the storage's clock is ahead of ours, by the timestamp of a file that is written now and removed.

    S3 and Azure give whole seconds, so that half a second is added.
    """
    before = time.time()
    try:
        storage.write(key, b"now")
        after = time.time()
        written = storage.modified(key)
    finally:
        storage.delete(key)
    return 0.0 if before - 1 <= written <= after + 1 else written + 0.5 - (before + after) / 2


def _write(descriptor: int, megabytes: int) -> None:
    data = os.urandom(_CHUNK)
    for _ in range(megabytes):
        os.write(descriptor, data)
    os.fsync(descriptor)


def _read(descriptor: int) -> None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    while os.read(descriptor, _CHUNK):
        pass

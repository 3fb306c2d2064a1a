"""How fast this process writes to a storage and reads from it, and rates in words."""

from __future__ import annotations

import filecmp
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.errors import UserError


class Speed(NamedTuple):
    """Bytes per second to a storage and from it."""

    write: float
    read: float


def measure_speed(storage: Storage, key: str, megabytes: int) -> Speed:
    """Write a file of random bytes and read it back. The caller deletes it, also after an error.

    Args:
        key: of the file; no other process may use it.
        megabytes: MiB of the file.

    Raises:
        UserError: the storage cannot be used, or gives back other bytes than it was sent.
        OSError: the folder for temporary files cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        sent, received = Path(folder) / "sent", Path(folder) / "received"
        with sent.open("wb") as file:
            for _ in range(megabytes):
                file.write(os.urandom(2**20))
        write = rate(megabytes, lambda: storage.upload(sent, key))
        read = rate(megabytes, lambda: storage.download(key, received))
        if not filecmp.cmp(sent, received, shallow=False):
            raise UserError("StorageCorrupts", f"{storage.uri}: the file that came back differs from the one sent")
    return Speed(write, read)


def rate_words(bytes_a_second: float) -> str:
    """A rate in decimal units, as networks and disks are sold."""
    if bytes_a_second >= 1e9:
        return f"{bytes_a_second / 1e9:.1f} GB/s"
    megabytes = bytes_a_second / 1e6
    return f"{megabytes:.0f} MB/s" if megabytes >= 10 else f"{megabytes:.2g} MB/s"


def rate(megabytes: int, work: Callable[[], None]) -> float:
    """Bytes per second of `work`, which moves that many MiB."""
    started = time.perf_counter()
    work()
    return megabytes * 2**20 / max(time.perf_counter() - started, 1e-9)

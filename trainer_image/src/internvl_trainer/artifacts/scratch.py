"""The scratch disk: folders for one file or a few, and a clear word when it is full."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl_trainer.artifacts.storage import is_full
from internvl_trainer.errors import UserError


@contextmanager
def scratch_folder(purpose: str, needed: int = 0) -> Iterator[Path]:
    """An empty folder that goes away with the block, on a disk with `needed` bytes free.

    Raises UserError with reason `DiskFull` when there are fewer, or when the disk fills up within the block.
    """
    disk = tempfile.gettempdir()
    if shutil.disk_usage(disk).free < needed:
        raise _disk_full(disk, purpose, needed)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{purpose}-") as folder:
            yield Path(folder)
    except OSError as error:
        if is_full(error):
            raise _disk_full(disk, purpose, needed) from error
        raise


def _disk_full(disk: str, purpose: str, needed: int) -> UserError:
    amount = f" {needed / 1e9:.1f} GB" if needed >= 1e8 else f" {needed / 1e6:.1f} MB" if needed else " more"
    free = shutil.disk_usage(disk).free / 1e6
    return UserError(
        "DiskFull",
        f"the scratch disk {disk} has {free:.1f} MB free, {purpose} needs{amount}; mount a larger volume there "
        "(spec.podTemplate.volumes and volumeMounts) or set TMPDIR. What was stored stays",
    )

"""Disk space: checked before long work, and named in the error when the disk fills up anyway."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl_api.quantity import gib

from internvl_trainer.artifacts.storage import is_full
from internvl_trainer.errors import UserError


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises UserError unless `needed` bytes are free where `folder` is or will be."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            "DiskFull",
            f"{what} needs {gib(needed)} there, {gib(free)} are free; delete something, or give it a larger volume",
            str(place),
        )


@contextmanager
def naming_full_disk(folder: Path, needed: int, what: str) -> Iterator[None]:
    """Within the block, a full disk raises a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise UserError(
            "DiskFull",
            f"the disk is full; {what} needs {gib(needed)} there. Delete something, or give it a larger volume",
            str(folder),
        ) from error


@contextmanager
def scratch_folder(needed: int, what: str) -> Iterator[Path]:
    """An empty folder on the scratch disk (TMPDIR) with `needed` bytes free; deleted at the end of the block."""
    disk = Path(tempfile.gettempdir())
    check_space(disk, needed, what)
    with naming_full_disk(disk, needed, what), tempfile.TemporaryDirectory() as folder:
        yield Path(folder)

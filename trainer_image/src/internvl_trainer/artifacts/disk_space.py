"""Room on disk: asked for before hours of work, and named when it runs out all the same."""

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
    """Within: a disk that another has filled meanwhile is a UserError too."""
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
    """An empty folder on the scratch disk (TMPDIR), which has `needed` bytes free; it goes away with the block."""
    disk = Path(tempfile.gettempdir())
    check_space(disk, needed, what)
    with naming_full_disk(disk, needed, what), tempfile.TemporaryDirectory() as folder:
        yield Path(folder)

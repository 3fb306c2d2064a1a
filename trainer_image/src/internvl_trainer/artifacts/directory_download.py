"""The files of a remote directory: listed, downloaded into a local folder, and compared with a cached copy."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from internvl_trainer.artifacts.cache import digest_of
from internvl_trainer.artifacts.checkpoint_files import is_weights
from internvl_trainer.artifacts.https import HttpsSource
from internvl_trainer.artifacts.storage import Storage, StoredFile, inside
from internvl_trainer.errors import Unavailable, UserError

_PARALLEL_FILES = 8


def has_small_files_of(storage: Storage | HttpsSource, files: Iterable[StoredFile], folder: Path) -> bool:
    """Whether code, tokenizer and configuration in a cached folder equal their source; reads the source."""
    wanted = [file for file in files if not is_weights(file.key)]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    if not found <= {file.key for file in wanted}:
        return False
    return all((folder / file.key).read_bytes() == storage.read(file.key) for file in wanted)


def download_files(storage: Storage | HttpsSource, files: Iterable[StoredFile], folder: Path) -> None:
    """Download the files into a folder, several at a time; keeps those that an earlier attempt has downloaded."""

    def download(file: StoredFile) -> None:
        path = folder / inside(file.key, field=storage.uri)
        if path.exists():  # an earlier attempt downloaded it
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        arriving = path.with_name(f".arriving-{digest_of(path.name)}")
        storage.download(file.key, arriving)
        if arriving.stat().st_size != file.size:
            raise Unavailable("DownloadIncomplete", f"{storage.uri}/{file.key} changed while it was read; try again")
        os.replace(arriving, path)

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        list(pool.map(download, files))


def require_files(storage: Storage | HttpsSource, files: Iterable[StoredFile], field: str) -> list[StoredFile]:
    """The files as a list. Raises UserError when there is none."""
    found = list(files)
    if not found:
        raise UserError("NotFound", f"found no file under {storage.uri}; check the URI", field)
    return found

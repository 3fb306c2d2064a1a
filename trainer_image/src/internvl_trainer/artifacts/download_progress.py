"""Progress of downloads, by any client: counts the bytes that have arrived in the target folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from internvl_api.constants import DOWNLOADING

_INTERVAL = 1.0  # seconds
_listeners: list[Callable[[str | None], object]] = []


@contextmanager
def told_to(listener: Callable[[str | None], object]) -> Iterator[None]:
    """Within the block, call `listener` about once a second with the progress of each download of this process.

    At the end of a download it gets None.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def announced(uri: str, folder: Path, total: int = 0) -> Iterator[None]:
    """Within the block, report how `folder` grows to `total` bytes."""
    done = threading.Event()

    def follow() -> None:
        while not done.is_set():
            _tell(progress_text(uri, _size(folder), total))
            done.wait(_INTERVAL)

    thread = threading.Thread(target=follow, name="download", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _tell(None)


def _tell(text: str | None) -> None:
    for listener in _listeners:
        listener(text)


def progress_text(uri: str, arrived: int, total: int) -> str:
    """The progress text of a download of `total` bytes, 0 when that is not known.

    >>> progress_text("s3://data/rows.jsonl", 2_000, 4_100)
    'downloading s3://data/rows.jsonl: 2.0 kB of 4.1 kB'
    """
    known = f"{_text(min(arrived, total))} of {_text(total)}" if total > 0 else _text(arrived)
    return f"{DOWNLOADING} {uri}: {known}"


def _text(size: int) -> str:
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # leaves out what is deleted meanwhile, unlike rglob
        for name in names:
            with suppress(FileNotFoundError):  # renamed meanwhile
                total += os.stat(os.path.join(parent, name)).st_size
    return total

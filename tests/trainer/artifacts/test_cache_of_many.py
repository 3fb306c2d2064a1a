"""A cache that many processes fill at once keeps its bound, and survives what the others delete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from internvl_trainer.artifacts.cache import Cache

LIMIT = 100_000
ITEM = 1_000


def used(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / "entries").iterdir())


def test_processes_that_each_add_little_keep_the_bound_together(tmp_path: Path) -> None:
    """Thirty-two data workers, in step: none alone adds a twentieth of the limit before the bound is reached."""
    workers = [Cache(tmp_path, LIMIT) for _ in range(32)]
    most = 0
    for number in range(320):
        workers[number % 32].bytes_of(f"picture {number}", lambda: bytes(ITEM))
        most = max(most, used(tmp_path))
    assert LIMIT * 0.9 < most <= LIMIT * 1.05 + 2 * ITEM


def test_a_count_that_someone_changed_is_only_a_reason_to_look(tmp_path: Path) -> None:
    cache = Cache(tmp_path, LIMIT)
    (tmp_path / "locks" / "added").write_bytes(b"\xff" * 100)
    assert cache.bytes_of("picture", lambda: b"pixels") == b"pixels"
    for number in range(300):
        cache.bytes_of(f"picture {number}", lambda: bytes(ITEM))
    assert used(tmp_path) <= LIMIT * 1.05 + 2 * ITEM


def test_an_entry_that_goes_while_room_is_made(tmp_path: Path) -> None:
    """A name without a file, as a process sees it when another one deletes the entry after the folder was listed."""
    cache = Cache(tmp_path, LIMIT)
    (tmp_path / "entries" / "gone").symlink_to(tmp_path / "nowhere")
    cache.bytes_of("picture", lambda: b"pixels")
    cache.evict()


def test_a_picture_that_is_evicted_as_soon_as_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def evicted(source: Any, target: Any) -> None:
        replace(source, target)
        os.unlink(target)

    monkeypatch.setattr(os, "replace", evicted)
    assert Cache(tmp_path, LIMIT).bytes_of("picture", lambda: b"pixels") == b"pixels"

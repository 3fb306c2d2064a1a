"""Recognise git-lfs pointers: short texts that a clone has in place of files that were not pulled."""

from __future__ import annotations

from pathlib import Path

POINTER = b"version https://git-lfs"
"""How a pointer begins."""


def is_pointer(path: Path) -> bool:
    """Whether an existing file is a git-lfs pointer."""
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER

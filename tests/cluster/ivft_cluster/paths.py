"""Paths: the cache (built once, shared by every checkout), the state of a running cluster, the checkout."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parents[2]


def cache_dir() -> Path:
    """The cache folder, made if absent; outside the checkout so that a fresh clone starts warm."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "internvl-operator"
    path.mkdir(parents=True, exist_ok=True)
    return path


def default_state_dir() -> Path:
    return cache_dir() / "cluster"


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock `name`, so that one process builds and others wait."""
    with FileLock(cache_dir() / f"{name}.lock"):
        yield


def content_hash(parts: Iterable[str | Path], root: Path | None = None) -> str:
    """16 hex digits over strings and files (relative path, executable bit and content); order matters."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            name = part.relative_to(root) if root else part.name
            executable = bool(part.stat().st_mode & 0o100)
            digest.update(f"file {name} {executable} {part.stat().st_size}\0".encode())
            with part.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        else:
            digest.update(f"text {len(part)}\0{part}".encode())
    return digest.hexdigest()[:16]

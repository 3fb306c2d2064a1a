"""Files, then a manifest with their sizes and sha256 LAST: no manifest, no artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from internvl_trainer.artifacts.storage import Storage, inside, sha256_of
from internvl_trainer.errors import UserError

MANIFEST = "manifest.json"
_PARALLEL_FILES = 4  # each is itself sent in parallel parts


class ManifestError(UserError):
    """A stored file differs from its manifest, or a manifest cannot be read."""


@dataclass(frozen=True)
class ManifestFile:
    """One file; `path` is relative to the manifest's folder, `sha256` in hex, `size` in bytes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder in storage. `extra` is the writer's own data; `sha256` is the stored text's."""

    fingerprint: str
    files: list[ManifestFile]
    extra: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    sha256: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def named(self, prefix: str) -> list[ManifestFile]:
        """The files whose path starts with `prefix`."""
        return [file for file in self.files if file.path.startswith(prefix)]


def describe(name: str, path: Path) -> ManifestFile:
    """The manifest entry of a local file that is stored under `name`."""
    return ManifestFile(name, path.stat().st_size, sha256_of(path))


def upload_files(storage: Storage, folder: str, files: Mapping[str, Path]) -> list[ManifestFile]:
    """Store local files as `folder`/name, several at a time; their manifest entries."""

    def upload(item: tuple[str, Path]) -> ManifestFile:
        name, path = item
        described = describe(name, path)
        storage.upload(path, f"{folder}/{name}", sha256=described.sha256)
        return described

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        return list(pool.map(upload, sorted(files.items())))


def commit(storage: Storage, folder: str, files: list[ManifestFile], fingerprint: str, **extra: Any) -> Manifest:
    """Write the manifest of files that are already stored, which makes the folder valid."""
    document = {
        "version": 1,
        "fingerprint": fingerprint,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": [asdict(file) for file in sorted(files, key=lambda file: file.path)],
        **extra,
    }
    text = json.dumps(document, indent=1, sort_keys=True).encode()
    storage.write(f"{folder}/{MANIFEST}", text)
    return _parse(text, folder)


def read_manifest(storage: Storage, folder: str) -> Manifest | None:
    """The manifest of a folder, or None where there is none. Raises ManifestError when it cannot be read."""
    key = f"{folder}/{MANIFEST}"
    return _parse(storage.read(key), f"{storage.uri}/{key}") if storage.stat(key) else None


def check_sizes(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Check cheaply that every file exists with its size. Raises ManifestError naming the first that does not."""
    found = {stored.key.removeprefix(f"{folder}/"): stored.size for stored in storage.list(f"{folder}/")}
    for file in manifest.files:
        size = found.get(file.path)
        if size != file.size:
            what = "is absent" if size is None else f"has {size} bytes"
            place = f"{storage.uri}/{folder}/{file.path}"
            raise ManifestError("ArtifactBroken", f"{place} {what}, its manifest says {file.size} bytes")


def fetch_files(storage: Storage, folder: str, files: Iterable[ManifestFile], target: Path) -> None:
    """Download into `target` and check every sha256. Raises ManifestError naming a file that differs."""

    def fetch(file: ManifestFile) -> None:
        path = target / inside(file.path, field=f"{storage.uri}/{folder}/{MANIFEST}")
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.download(f"{folder}/{file.path}", path)
        if (digest := sha256_of(path)) != file.sha256:
            place = f"{storage.uri}/{folder}/{file.path}"
            raise ManifestError("ArtifactBroken", f"{place} has sha256 {digest}, its manifest says {file.sha256}")

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        list(pool.map(fetch, files))


def discard(storage: Storage, folder: str) -> None:
    """Delete a folder, its manifest first, so that it is never valid with files missing."""
    storage.delete(f"{folder}/{MANIFEST}")
    storage.delete(f"{folder}/")


def _parse(text: bytes, place: str) -> Manifest:
    try:
        document = json.loads(text)
        files = [ManifestFile(**file) for file in document.pop("files")]
        known = {name: document.pop(name) for name in ("fingerprint", "created")}
        document.pop("version")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ManifestError("ManifestBroken", f"{place} is not a manifest: {error!r}") from error
    return Manifest(files=files, extra=document, sha256=hashlib.sha256(text).hexdigest(), **known)

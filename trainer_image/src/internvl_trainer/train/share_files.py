"""The files of one rank's share of a checkpoint: written and stored one after the other, read back the same way.

No more than the files in flight are on the scratch disk at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file

from internvl_trainer.artifacts.disk_space import scratch_folder
from internvl_trainer.artifacts.manifest import Manifest, ManifestFile, describe, fetch_files
from internvl_trainer.artifacts.storage import Storage, persistently
from internvl_trainer.train.host_share import FILE_BYTES, HostShare, Piece
from internvl_trainer.train.optimizer_shards import Fragment

_READ_TOGETHER = 2  # files: one is checked while the next one comes

# The parameter ranges in each file: file to parameter to [start, length].
Layout = dict[str, dict[str, list[int]]]


class Stored(NamedTuple):
    """What one rank has stored of a checkpoint."""

    files: list[ManifestFile]
    layout: Layout


def store_share(
    storage: Storage, folder: str, rank: int, share: HostShare, kinds: Sequence[str], tell: Callable[[int], object]
) -> Stored:
    """Store these kinds of a share as `folder`/rank-*.safetensors; `tell` gets the bytes stored so far.

    Raises UserError when storage stays unavailable or the scratch disk has no room for one file.
    """
    stored = Stored([], {})
    with scratch_folder(min(share.bytes_of(kinds), FILE_BYTES), "a file of a checkpoint") as scratch:
        for number, pieces in enumerate(share.files(kinds)):
            name = f"rank-{rank:05d}-{number:03d}.safetensors"
            path = scratch / name
            save_file({f"{kind}/{piece.name}": share.values(kind, piece) for piece in pieces for kind in kinds}, path)
            stored.files.append(store_file(storage, folder, name, path))
            path.unlink()
            stored.layout[name] = {piece.name: [piece.start, piece.length] for piece in pieces}
            tell(sum(file.size for file in stored.files))
    return stored


def store_file(storage: Storage, folder: str, name: str, path: Path) -> ManifestFile:
    """Store one local file, waiting while storage is unavailable; its entry for the manifest."""
    described = describe(name, path)

    def upload() -> None:
        storage.upload(path, f"{folder}/{name}", sha256=described.sha256)

    persistently(upload)()
    return described


def load_share(storage: Storage, folder: str, manifest: Manifest, share: HostShare, kinds: Sequence[str]) -> None:
    """Fill these kinds of a share from a checkpoint, whichever world size wrote it.

    Raises ManifestError for a file that differs from the manifest, UserError when the scratch disk has no room for the
    largest files.
    """
    layout: Layout = manifest.extra["layout"]
    wanted = [(file, found) for file in manifest.files if (found := _overlaps(share.fragments, layout.get(file.path)))]
    sizes = sorted((file.size for file, _ in wanted), reverse=True)

    def load(item: tuple[ManifestFile, list[Overlap]]) -> None:
        file, overlaps = item
        with tempfile.TemporaryDirectory(dir=scratch) as own:
            fetch_files(storage, folder, [file], Path(own))
            with safe_open(Path(own) / file.path, "pt") as tensors:
                for piece, offset in overlaps:
                    for kind in kinds:
                        stored = tensors.get_slice(f"{kind}/{piece.name}")
                        share.values(kind, piece).copy_(stored[offset : offset + piece.length])

    with (
        scratch_folder(sum(sizes[:_READ_TOGETHER]), "resuming from a checkpoint, two files at a time,") as scratch,
        ThreadPoolExecutor(_READ_TOGETHER) as pool,
    ):
        list(pool.map(load, wanted))


class Overlap(NamedTuple):
    """A piece of a fragment, and where it begins in the range that a file holds of the same parameter."""

    piece: Piece
    offset: int


def _overlaps(fragments: Sequence[Fragment], ranges: dict[str, list[int]] | None) -> list[Overlap]:
    """The pieces of the fragments that a file with these ranges of parameters holds."""
    return [overlap for part in fragments for overlap in _overlap(part, (ranges or {}).get(part.name))]


def _overlap(part: Fragment, held: list[int] | None) -> Iterator[Overlap]:
    if held is None:
        return
    file_start, length = held
    start, stop = max(part.start, file_start), min(part.start + part.length, file_start + length)
    if start < stop:
        yield Overlap(Piece(part.name, start, stop - start), start - file_start)

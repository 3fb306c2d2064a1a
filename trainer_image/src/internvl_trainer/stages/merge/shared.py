"""Shared by merging of both kinds of model: disk space, storing, and the error of a failed check."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from internvl_trainer.artifacts.disk_space import check_space
from internvl_trainer.artifacts.manifest import ManifestFile
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.errors import UserError
from internvl_trainer.model.checkpoint_source import Source
from internvl_trainer.stage_store import StageStore

MARGIN = 256 << 20  # bytes on disk beyond the weights: tokenizer, configuration, other programs' needs


def check_room(storage: Storage, source: Source, scratch: Path, formats: int) -> int:
    """The bytes of one written model. Raises UserError unless scratch has room for one and the output for all."""
    size = sum(entry.nbytes for entry in source.entries) + MARGIN
    check_space(scratch.parent, size, "a merged model")
    if "://" not in storage.uri:  # a folder
        check_space(Path(storage.uri), formats * size, f"the merged model in {formats} formats")
    return size


def store_directory(stages: StageStore, directory: Path) -> Iterator[ManifestFile]:
    """Store each file and delete it here at once: an output on the same disk never needs the room twice."""
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = f"{directory.name}/{path.relative_to(directory).as_posix()}"
        yield from stages.upload("merge", {name: path})
        path.unlink()


def check_failed(directory: Path, what: str) -> UserError:
    """The error for a written model that differs from the trained one."""
    return UserError(
        "MergeCheckFailed",
        f"{what}; the written model is not kept. What was trained is whole: run merge again, on another machine if it "
        "fails again",
        f"{directory.name}/",
    )

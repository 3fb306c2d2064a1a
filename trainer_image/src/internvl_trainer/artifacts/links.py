"""Links are followed within a root only: a link that leaves it could name any file of the pod."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from internvl_trainer.errors import UserError

_SNAPSHOTS, _HUB_CACHE = "snapshots", ("models--", "datasets--")


def check_inside(path: Path, root: Path) -> None:
    """Raises UserError LinkLeavesRoot for a path that leads out of `root` through a link."""
    target, permitted = path.resolve(), _permitted(root.resolve())
    if not target.is_relative_to(permitted):
        name = path.relative_to(root).as_posix()
        raise UserError("LinkLeavesRoot", f"{name} is a link out of this folder; store the file itself", str(root))


def files_below(root: Path) -> Iterator[Path]:
    """The regular files below a folder, in order. Raises UserError LinkLeavesRoot."""
    for path in sorted(root.rglob("*")):
        if path.is_file():
            check_inside(path, root)
            yield path


def _permitted(root: Path) -> Path:
    """Where links may lead: in a cache of huggingface_hub, a snapshot's files are links to its repository's blobs."""
    repository = root.parent.parent
    if root.parent.name == _SNAPSHOTS and repository.name.startswith(_HUB_CACHE):
        return repository
    return root

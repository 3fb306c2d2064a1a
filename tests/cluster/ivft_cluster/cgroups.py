"""One cgroup tree a node, in every hierarchy of cgroup v1 or in the single one of v2."""

from __future__ import annotations

import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def hierarchies() -> list[Path]:
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    return [path for path in ROOT.iterdir() if not path.is_symlink() and (path / "cgroup.procs").exists()]


def create(name: str) -> None:
    for hierarchy in hierarchies():
        group = hierarchy / name
        group.mkdir(exist_ok=True)
        if (hierarchy / "cgroup.controllers").exists():
            wanted = " ".join(f"+{each}" for each in (hierarchy / "cgroup.controllers").read_text().split())
            for folder in (hierarchy, group):
                (folder / "cgroup.subtree_control").write_text(wanted)
        if (hierarchy / "cpuset.cpus").exists():  # v1: an empty cpuset takes no process
            for file in ("cpuset.cpus", "cpuset.mems"):
                (group / file).write_text((hierarchy / file).read_text())
            (group / "cgroup.clone_children").write_text("1")


def remove(prefix: str, timeout: float = 10) -> None:
    """Remove every tree whose name starts with `prefix`; the kernel may hold one a moment after its last process.

    Raises OSError when one is still in use after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    for tree in [path for hierarchy in hierarchies() for path in hierarchy.glob(f"{prefix}*")]:
        for group in sorted((path for path in [tree, *tree.rglob("*")] if path.is_dir()), reverse=True):
            while group.exists():
                try:
                    group.rmdir()
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)

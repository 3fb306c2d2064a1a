"""Processes with a memory limit each, by control groups of version 1 or 2, and what they used of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_EVERY = 0.05  # seconds
_V1, _V2 = Path("/sys/fs/cgroup/memory"), (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


class NoMemoryGroups(Exception):
    """Memory cannot be limited here."""


@dataclass
class MemoryGroup:
    """One process and its children, with a limit that the kernel keeps.

    Attributes:
        peak: most bytes since the last call of `start_over`, by samples: memory that cannot be reclaimed, so without
            the page cache.
    """

    folder: Path
    names: tuple[str, ...]
    events: Path
    peak: int = field(default=0, init=False)

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` in this group."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]

    @property
    def was_killed(self) -> bool:
        """Whether the kernel killed a process of the group for its memory."""
        return _figures(self.events).get("oom_kill", 0) > 0

    def sample(self) -> None:
        """Take the memory in use now."""
        figures = _figures(self.folder / "memory.stat")
        self.peak = max(self.peak, sum(figures[name] for name in self.names))

    def start_over(self) -> int:
        """The peak so far; the next one counts from now."""
        peak, self.peak = self.peak, 0
        return peak


@contextmanager
def memory_groups(count: int, limit: int | None) -> Iterator[list[MemoryGroup]]:
    """That many groups, sampled within the block. Raises NoMemoryGroups where the kernel or the user has none.

    Args:
        limit: bytes of each; None for none.
    """
    groups: list[MemoryGroup] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_EVERY):
            for group in groups:
                group.sample()

    watcher = threading.Thread(target=watch, daemon=True)
    try:
        groups.extend(_make(f"trainer-test-{time.time_ns()}-{number}", limit) for number in range(count))
        watcher.start()
        yield groups
    finally:
        ended.set()
        if watcher.ident:
            watcher.join()
        for group in groups:
            _remove(group.folder)


def _make(name: str, limit: int | None) -> MemoryGroup:
    try:
        if (_V1 / "memory.limit_in_bytes").exists():
            return _make_v1(_V1 / name, limit)
        for root in _V2:
            with suppress(FileNotFoundError):
                if "memory" in (root / "cgroup.controllers").read_text().split():
                    return _make_v2(root, name, limit)
    except OSError as error:
        raise NoMemoryGroups(f"a memory limit needs root and a writable /sys/fs/cgroup: {error}") from error
    raise NoMemoryGroups("a memory limit needs the memory controller of cgroups; /sys/fs/cgroup has none")


def _make_v1(folder: Path, limit: int | None) -> MemoryGroup:
    folder.mkdir()
    if limit is not None:
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        with suppress(FileNotFoundError):  # a kernel that does not count swap
            (folder / "memory.memsw.limit_in_bytes").write_text(str(limit))
    return MemoryGroup(folder, ("total_rss", "total_shmem"), folder / "memory.oom_control")


def _make_v2(root: Path, name: str, limit: int | None) -> MemoryGroup:
    folder = root / name
    (root / "cgroup.subtree_control").write_text("+memory")
    folder.mkdir()
    if limit is not None:
        (folder / "memory.max").write_text(str(limit))
        with suppress(FileNotFoundError):
            (folder / "memory.swap.max").write_text("0")
    return MemoryGroup(folder, ("anon", "shmem"), folder / "memory.events")


def _remove(folder: Path) -> None:
    """Remove a group; the kernel may take a moment to let go of its last process."""
    limit = time.monotonic() + 10
    while True:
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(_EVERY)
        else:
            return


def _figures(path: Path) -> dict[str, int]:
    return {name: int(number) for name, number in (line.split() for line in path.read_text().splitlines())}

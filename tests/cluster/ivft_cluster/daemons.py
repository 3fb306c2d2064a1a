"""Background processes that any command can find again, also after their parent crashed.

Each daemon carries `IVFT_CLUSTER_MEMBER=<cluster id>/<name>` in its environment. The kernel keeps that as long as
the process lives, so there are no pid files to go stale and no pid of a stranger to kill.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

MARK = "IVFT_CLUSTER_MEMBER"


def start(
    member: str,
    argv: Sequence[str | Path],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    die_with_parent: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a daemon in its own session, its output appended to `log`.

    `die_with_parent` makes the kernel kill it when the starting process ends, however that ends.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    prefix = ["setpriv", "--pdeathsig", "KILL", "--"] if die_with_parent else []
    with log.open("ab") as sink:
        return subprocess.Popen(
            [*prefix, *(str(word) for word in argv)],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            env={**os.environ, **(env or {}), MARK: member},
        )


def everyone() -> Iterator[psutil.Process]:
    """Every process now. psutil.process_iter may give one that has ended, where a newer one has its number."""
    for number in psutil.pids():
        with contextlib.suppress(psutil.NoSuchProcess):
            yield psutil.Process(number)


def find(member: str) -> list[psutil.Process]:
    """Living processes of one member, or of a whole cluster when `member` is a cluster id; oldest first."""
    found = []
    for process in everyone():
        try:
            mark = process.environ().get(MARK, "")
            process.create_time()  # read now, and kept: the process may be gone when the list is sorted
        except (psutil.Error, OSError):
            continue
        if (mark == member or mark.startswith(f"{member}/")) and is_alive(process):
            found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def kill(processes: Sequence[psutil.Process], timeout: float = 20) -> None:
    """SIGKILL; returns when all are gone.

    Raises psutil.TimeoutExpired when the kernel does not let go of one within `timeout` seconds.
    """
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, waiting = psutil.wait_procs(processes, timeout=timeout)
    if stuck := [process for process in waiting if is_alive(process)]:
        raise psutil.TimeoutExpired(timeout, pid=stuck[0].pid)


def name_of(process: psutil.Process) -> str:
    """The process's name, or an empty string when it is gone."""
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False

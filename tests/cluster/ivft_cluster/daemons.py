"""Background processes that can be found again by anyone, also after a crash of whoever started them.

Each daemon carries `IVFT_CLUSTER_MEMBER=<cluster id>/<name>` in its environment. The kernel keeps that as long as
the process lives, so there are no pid files to go stale and no pid of a stranger to kill.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
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


def find(member: str) -> list[psutil.Process]:
    """Living processes of one member, or of a whole cluster when `member` is a cluster id; oldest first."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK, "")
            alive = process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            continue
        if alive and (mark == member or mark.startswith(f"{member}/")):
            found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def kill(processes: Sequence[psutil.Process], *, grace: float = 0, timeout: float = 20) -> None:
    """SIGTERM first when `grace` seconds are given, then SIGKILL; returns when all are gone.

    Raises psutil.TimeoutExpired when the kernel does not let go of one within `timeout` seconds.
    """
    if grace:
        for process in processes:
            _signal(process.terminate)
        _, processes = psutil.wait_procs(processes, timeout=grace)
    for process in processes:
        _signal(process.kill)
    _, stuck = psutil.wait_procs(processes, timeout=timeout)
    stuck = [process for process in stuck if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    if stuck:
        raise psutil.TimeoutExpired(timeout, pid=stuck[0].pid)


def _signal(send: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        send()

"""Several training processes on one machine: starts them, forwards signals, ends all when one fails."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from internvl_api.constants import ExitCode

from internvl_trainer.distributed import Rendezvous
from internvl_trainer.exit_status import ENV_TERMINATION_LOG
from internvl_trainer.signals import handled

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 10.0  # for processes to notice that a peer is gone, before they are killed

_TELLING = (ExitCode.USER_ERROR, ExitCode.ACCESS_DENIED, ExitCode.CONFIG, ExitCode.UNAVAILABLE)


def launch(
    command: Sequence[str],
    rendezvous: Rendezvous,
    result_path: Path | None,
    output: Callable[[str], None] | None = None,
) -> int:
    """Run `command` once for each local rank; the exit code that decides (128 + number for a signal).

    The decisive process's termination message goes to `result_path`. Each line the processes print goes to `output`,
    or where this process prints.
    """
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        results = [Path(folder) / f"result-{rank}.json" for rank in range(rendezvous.processes)]
        for path in results:
            path.touch()
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **rendezvous.environment(rank), ENV_TERMINATION_LOG: str(path)},
                stdout=subprocess.PIPE if output else None,
                stderr=subprocess.STDOUT if output else None,
            )
            for rank, path in enumerate(results)
        ]
        readers = [_pass_on(process, output) for process in processes if output]
        with forwarded_signals(processes):
            decisive = _wait(processes, results)
        for reader in readers:
            reader.join()
        if result_path is not None and (text := results[decisive].read_text(encoding="utf-8")):
            result_path.write_text(text, encoding="utf-8")
        return exit_code(processes[decisive].returncode)


def _pass_on(process: subprocess.Popen[bytes], output: Callable[[str], None]) -> threading.Thread:
    def read() -> None:
        for line in process.stdout or ():
            output(line.decode(errors="replace").rstrip())

    thread = threading.Thread(target=read, name=f"output of {process.pid}", daemon=True)
    thread.start()
    return thread


@contextmanager
def forwarded_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Within the block, SIGTERM and Ctrl-C reach every process as SIGTERM."""

    def forward(_number: int, _frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.terminate()

    with handled(forward):
        yield


def _wait(processes: Sequence[subprocess.Popen[bytes]], results: Sequence[Path]) -> int:
    """The rank whose exit code decides: 0 when all succeed, else the one that knows the cause best."""
    while True:
        codes = [process.poll() for process in processes]
        broken = [rank for rank, code in enumerate(codes) if code not in (None, ExitCode.OK, ExitCode.RESUME)]
        if broken:
            logger.error("rank(s) %s of this machine failed; ending the others", broken)
            _end(processes)
            return _cause(processes, results, broken)
        if None not in codes:
            return next((rank for rank, code in enumerate(codes) if code), 0)
        time.sleep(_POLL_SECONDS)


def _cause(processes: Sequence[subprocess.Popen[bytes]], results: Sequence[Path], first_broken: Sequence[int]) -> int:
    """The rank that knows the cause: one with a user error, else one that was killed, else one that lost no peer."""
    telling = [rank for rank, process in enumerate(processes) if process.returncode in _TELLING]
    killed = [rank for rank in first_broken if processes[rank].returncode < 0]
    alone = [rank for rank in first_broken if '"PeerLost"' not in results[rank].read_text(encoding="utf-8")]
    return [*telling, *killed, *alone, *first_broken][0]


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Give the peers of a failed process time to exit, then kill them: without it they cannot save a checkpoint."""
    limit = time.monotonic() + _PATIENCE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def exit_code(returncode: int) -> int:
    """The exit code as a shell reports it."""
    return returncode if returncode >= 0 else 128 - returncode


def own_command(stage: str, config: str) -> list[str]:
    """The command that runs a stage in another process."""
    return [sys.executable, "-m", "internvl_trainer", stage, "--config", config]

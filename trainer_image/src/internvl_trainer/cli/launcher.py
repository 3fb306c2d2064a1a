"""Several training processes on one machine: starts them, forwards signals, ends all when one fails."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Protocol

from internvl_api import faults
from internvl_api.constants import ExitCode
from internvl_api.status import StageName

from internvl_trainer.distributed import Rendezvous
from internvl_trainer.exit_status import ENV_TERMINATION_LOG, Outcome, aborted, termination_message
from internvl_trainer.signals import handled

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 10.0  # for processes to notice that a peer is gone, before they are killed
_DRAIN_SECONDS = 2.0  # for the last lines of a process; a child of its own may hold the pipe open for longer
_TAIL_BYTES = 1 << 17  # of what a process printed; C++ stack traces follow the sentence that says why
_STDERR = 2

_TELLING = (ExitCode.USER_ERROR, ExitCode.ACCESS_DENIED, ExitCode.CONFIG, ExitCode.UNAVAILABLE)


def launch(
    command: Sequence[str],
    rendezvous: Rendezvous,
    result_path: Path | None,
    output: Callable[[str], None] | None = None,
    stage: StageName = "train",
    peers: Peers | None = None,
) -> int:
    """Run `command` once for each local rank; the exit code that decides (128 + number for a signal).

    The decisive process's termination message goes to `result_path`. Each line the processes print goes to `output`,
    or where this process prints. With `output` a terminal's Ctrl-C reaches this process alone, which forwards it.

    Args:
        peers: the run's processes on other machines; when one of them has failed, those here are ended.
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
                stderr=subprocess.STDOUT if output else subprocess.PIPE,
                process_group=0 if output else None,
            )
            for rank, path in enumerate(results, start=rendezvous.local_rank)
        ]
        printed = [_Printed(process, output) for process in processes]
        with forwarded_signals(processes):
            broken = _wait(processes, peers)
        _drain(printed)
        for rank, path in enumerate(results):
            if processes[rank].returncode == -signal.SIGABRT and not path.stat().st_size:
                result = aborted(stage, printed[rank].tail(), rendezvous.rank + rank)
                path.write_bytes(termination_message(result) if result else b"")
        decisive = _decisive(processes, results, broken)
        if result_path is not None and (text := results[decisive].read_text(encoding="utf-8")):
            result_path.write_text(text, encoding="utf-8")
        return exit_code(processes[decisive].returncode)


class Peers(Protocol):
    """The processes of the run on other machines."""

    def have_failed(self) -> bool:
        """Whether one of them failed or is gone."""
        ...


class _Printed:
    """Passes on what a process prints, and keeps the end of it."""

    def __init__(self, process: subprocess.Popen[bytes], output: Callable[[str], None] | None) -> None:
        self._process, self._output, self._end = process, output, bytearray()
        self._reader = threading.Thread(target=self._read, name=f"output of {process.pid}", daemon=True)
        self._reader.start()

    def tail(self) -> str:
        """The last characters."""
        return bytes(self._end).decode(errors="replace")

    def join(self, seconds: float) -> None:
        """Wait for the end of what it prints, for so long at most."""
        self._reader.join(seconds)

    def _read(self) -> None:
        for data in self._process.stdout or iter(self._chunk, b""):
            self._end += data
            del self._end[:-_TAIL_BYTES]
            if self._output:
                self._output(data.decode(errors="replace").rstrip())
            else:
                with suppress(OSError):  # nobody reads it, and the process must not wait for a full pipe
                    os.write(_STDERR, data)

    def _chunk(self) -> bytes:
        """What stderr has now, whether or not a line ends; empty at its end."""
        return os.read(self._process.stderr.fileno(), 1 << 16) if self._process.stderr else b""


def _drain(printed: Sequence[_Printed]) -> None:
    """Wait for the last lines of processes that have ended."""
    limit = time.monotonic() + _DRAIN_SECONDS
    for each in printed:
        each.join(max(0.0, limit - time.monotonic()))


@contextmanager
def forwarded_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Within the block, SIGTERM and Ctrl-C reach every process as SIGTERM."""

    def forward(_number: int, _frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.terminate()

    with handled(forward):
        yield


def _wait(processes: Sequence[subprocess.Popen[bytes]], peers: Peers | None) -> list[int]:
    """Wait until all have ended; the ranks that failed first, whose peers were then ended."""
    while True:
        if peers is not None and peers.have_failed():
            logger.error("other processes of the run failed; ending those of this machine")
            _end(processes)
            return []
        codes = [process.poll() for process in processes]
        broken = [rank for rank, code in enumerate(codes) if code not in (None, ExitCode.OK, ExitCode.RESUME)]
        if broken:
            logger.error("rank(s) %s of this machine failed; ending the others", broken)
            _end(processes)
            return broken
        if None not in codes:
            return []
        time.sleep(_POLL_SECONDS)


def _decisive(processes: Sequence[subprocess.Popen[bytes]], results: Sequence[Path], broken: Sequence[int]) -> int:
    """The rank whose exit code decides.

    The first that did not succeed where none failed; else one with a user error, else one that knows a fault of its
    own, else one that was killed, else one that lost no peer.
    """
    if not broken:
        return next((rank for rank, process in enumerate(processes) if process.returncode), 0)
    texts = [path.read_text(encoding="utf-8") for path in results]
    telling = [rank for rank, process in enumerate(processes) if process.returncode in _TELLING]
    own = [rank for rank, text in enumerate(texts) if _has(text, faults.blamed("batch", "hardware", "node", "run"))]
    alone = [rank for rank in broken if not _has(texts[rank], faults.blamed("peer"))]
    killed = [rank for rank in alone if processes[rank].returncode < 0]
    return [*telling, *own, *killed, *alone, *broken][0]


def decisive_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of a stage over several machines.

    A failure that says what to correct; else one with a cause of its own, neither a lost peer nor a lost task; else a
    lost task; else any failure; else one that did not finish; else the first.
    """
    unfinished = [each for each in outcomes if each.code != ExitCode.OK]
    failed = [each for each in unfinished if each.code != ExitCode.RESUME]
    lost = [each for each in failed if each.result.reason == "TaskLost"]
    telling = [each for each in failed if each.code in _TELLING and each not in lost]
    known = [each for each in failed if not _has(f'"{each.result.reason}"', (*faults.blamed("peer"), "TaskLost"))]
    return [*telling, *known, *lost, *failed, *unfinished, *outcomes][0]


def _has(text: str, reasons: Sequence[str]) -> bool:
    """Whether a termination message has one of the reasons."""
    return any(f'"{reason}"' in text for reason in reasons)


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

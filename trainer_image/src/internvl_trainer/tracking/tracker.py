"""The stage's side of tracking: a bounded queue in front of the reporting process. Nothing here waits for a tracker."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from internvl_api.constants import ENV_ATTEMPT
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName, StageResult

from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.errors import UserError
from internvl_trainer.exit_status import redact
from internvl_trainer.signals import StopRequested
from internvl_trainer.terminal import printable
from internvl_trainer.tracking.records import Settings, Status, finite, parameters
from internvl_trainer.tracking.tracked_id import offline_folder, tracked_id

logger = logging.getLogger(__name__)

_QUEUED = 2000  # records
_END_SECONDS = 30.0  # to send what is left when a stage is done
_STOP_SECONDS = 3.0  # the same when the pod was told to stop, or the tracker has failed before
_OFFLINE_FILES = 1000
_SILENT_STAGES: tuple[StageName, ...] = ("preflight", "doctor", "merge")

Tell = Callable[[str], None]


class Tracker:
    """Takes reports; this one, of a run without a tracker and of ranks beside the first, drops them."""

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """Report figures after a step."""

    def about(self, parameters: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Report settings and tags."""

    def result(self, result: StageResult) -> None:
        """Report scores and the addresses of artifacts, and how the run goes on."""


class ProcessTracker(Tracker):
    """Sends reports through a child process."""

    def __init__(self, settings: Settings, tell: Tell, command: list[str] | None = None) -> None:
        self._tell, self._problem = tell, ""
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUED)
        self._stopping = False
        self._child = subprocess.Popen(
            command or [sys.executable, "-m", "internvl_trainer.tracking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a package's own words may hold what this process redacts
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._writer = threading.Thread(target=self._write, args=(settings,), name="tracking", daemon=True)
        self._reader = threading.Thread(target=self._read, name="tracking-problems", daemon=True)
        self._writer.start()
        self._reader.start()

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        self._put({"kind": "metrics", "step": step, "at": int(time.time() * 1000), "values": finite(values)})

    def about(self, parameters: Mapping[str, str], tags: Mapping[str, str]) -> None:
        self._put({"kind": "about", "parameters": dict(parameters), "tags": dict(tags)})

    def result(self, result: StageResult) -> None:
        if result.outcome == "resume":
            self.hurry()
        self._put({"kind": "result", "scores": scores_of(result), "addresses": addresses_of(result)})

    def hurry(self) -> None:
        """Send what is left in seconds at the end: the pod was told to stop."""
        self._stopping = True

    def close(self, status: Status) -> None:
        """Send what is left, for a bounded time."""
        seconds = _STOP_SECONDS if self._stopping or self._problem else _END_SECONDS
        deadline = time.monotonic() + seconds
        for record in ({"kind": "end", "status": status}, None):
            with suppress(queue.Full):
                self._queue.put(record, timeout=max(0.0, deadline - time.monotonic()))
        try:
            self._child.wait(max(0.1, deadline - time.monotonic()))
            for thread in (self._reader, self._writer):  # both find their pipe closed
                thread.join(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._complain(f"no answer within {seconds:.0f} s at the end of the stage")
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)  # with the processes that a package started
        self._child.wait()

    def _put(self, record: dict[str, Any]) -> None:
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._complain("reports come faster than they are sent; some are left out")

    def _write(self, settings: Settings) -> None:
        pipe = self._pipe(self._child.stdin)
        try:
            pipe.write(json.dumps(settings.to_dict()) + "\n")
            while (record := self._queue.get()) is not None:
                pipe.write(json.dumps(record) + "\n")
                pipe.flush()
            pipe.close()
        except OSError:
            self._complain("the reporting process has ended")

    def _read(self) -> None:
        for line in self._pipe(self._child.stdout):
            self._complain(line.strip())

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def _complain(self, problem: str) -> None:
        """Tell the first problem; the stage goes on."""
        if not self._problem:
            self._problem = problem or "unknown problem"
            self._tell(self._problem)


@contextmanager
def tracking(config: RunConfig, stage: StageName, storage: Storage, note: Tell, *, leads: bool) -> Iterator[Tracker]:
    """The tracker of a stage; at the end of the block it sends what is left. `note`: gets the first problem."""
    wanted = config.tracking
    if wanted is None or not leads or stage in _SILENT_STAGES:
        yield Tracker()
        return

    def tell(problem: str) -> None:
        text = printable(redact(f"{wanted.service}: {problem}; the stage goes on, and the tracker may lack figures"))
        logger.warning("spec.tracking: %s", text)
        note(text)

    with tempfile.TemporaryDirectory(prefix="tracking-", ignore_cleanup_errors=True) as folder:
        try:
            tracker = ProcessTracker(Settings.of(config, wanted, tracked_id(config, storage, tell), folder), tell)
        except OSError as error:
            tell(f"cannot start the reporting process: {error}")
            yield Tracker()
            return
        attempt = os.environ.get(ENV_ATTEMPT)
        tracker.about(parameters(config), tags_of(config, stage, attempt))
        status: Status = "failed"
        try:
            yield tracker
            status = "finished" if stage == "publish" else "unfinished"
        except StopRequested:
            tracker.hurry()
            status = "unfinished"
            raise
        finally:
            tracker.close(status)
            if wanted.offline:
                _keep(Path(folder), storage, offline_folder(stage, attempt), tell)


def tags_of(config: RunConfig, stage: StageName, attempt: str | None) -> dict[str, str]:
    """What names the run and the attempt at a stage."""
    tags = {"internvl.run": config.job, "internvl.uid": config.job_uid, "internvl.stage": stage}
    return tags | ({"internvl.attempt": attempt} if attempt else {})


def scores_of(result: StageResult) -> dict[str, float]:
    """`evaluation/final/coco/CIDEr` -> value, of the base model and the trained one."""
    if result.evaluation is None:
        return {}
    both = (("baseline", result.evaluation.baseline), ("final", result.evaluation.final))
    return finite(
        {
            f"evaluation/{model}/{task}/{name}": value
            for model, tasks in both
            for task, figures in tasks.items()
            for name, value in figures.items()
        }
    )


def addresses_of(result: StageResult) -> dict[str, str]:
    """Name -> address of what a stage made; nothing is uploaded to the tracker."""
    return {name: str(address) for name, address in list(result.artifacts.items())[:100]}


def _keep(folder: Path, storage: Storage, key: str, tell: Tell) -> None:
    """Store the files of a client without a server."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if len(paths) > _OFFLINE_FILES:
        tell(f"stored {_OFFLINE_FILES} of the {len(paths)} files of the client")
    try:
        for path in paths[:_OFFLINE_FILES]:
            storage.upload(path, f"{key}/{path.relative_to(folder).as_posix()}")
    except (OSError, UserError) as error:
        tell(f"cannot store the files of the client: {error}")

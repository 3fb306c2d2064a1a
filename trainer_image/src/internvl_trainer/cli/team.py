"""The tasks of one run on several machines: task 0 leads, and tells the others which stage comes.

Each other task keeps one TCP connection to task 0. Messages are lines of JSON of bounded length. A connection that
closes means that the task at its other end is gone.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from internvl_api.constants import ExitCode
from internvl_api.status import StageName, StageResult

from internvl_trainer.cli.place import Place
from internvl_trainer.errors import Unavailable
from internvl_trainer.exit_status import Outcome

MEETING_SECONDS = 600.0
"""Longest wait for all tasks: some may start late, on nodes that are still being prepared."""
_NO_MESSAGE = (OSError, ValueError, RecursionError)
"""Errors of reading from a closed connection, and of decoding a line that is not a message."""
_HELLO_SECONDS = 10.0
_RETRY_SECONDS = 0.5
_LONGEST_LINE = 1 << 15  # bytes; a result has 4096 at most
_ENDED = (ExitCode.OK, ExitCode.RESUME)


class Channel:
    """One connection: lines of JSON both ways. `closed` is set when the other side is gone."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._connection, self._file = connection, connection.makefile("rb")
        self.closed = threading.Event()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; nothing when the other side is gone, which the reader notices."""
        with suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end, and for a line that is no message."""
        with suppress(*_NO_MESSAGE):
            line = self._file.readline(_LONGEST_LINE)
            if line.endswith(b"\n") and isinstance(message := json.loads(line), dict):
                return message
        self.closed.set()
        return None

    def finish_sending(self) -> None:
        """Send no more; what was sent still arrives."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Leader:
    """Task 0: has a connection to each other task."""

    def __init__(self, place: Place, channels: Mapping[int, Channel]) -> None:
        self.place, self._channels = place, dict(channels)
        self._answers: dict[int, queue.SimpleQueue[Outcome | None]] = {}
        self._failed = threading.Event()
        for task, channel in self._channels.items():
            self._answers[task] = queue.SimpleQueue()
            threading.Thread(target=self._read, args=(task, channel), name=f"task {task}", daemon=True).start()

    def start(self, stage: StageName, port: int) -> None:
        """Tell the other tasks to run a stage, whose ranks meet at `port` of this machine."""
        for channel in self._channels.values():
            channel.send({"stage": stage, "port": port})

    def have_failed(self) -> bool:
        """Whether another task failed or is gone."""
        return self._failed.is_set()

    def outcomes(self, stage: StageName, own: Outcome) -> list[Outcome]:
        """How the stage ended in every task, this one first. If it failed here, the others are told to end it."""
        if own.code not in _ENDED:
            for channel in self._channels.values():
                channel.send({"stop": stage})
        found = [own]
        for task, answers in self._answers.items():
            found.append(answers.get() or self._lost(stage, task))
        return found

    def end(self, code: int) -> None:
        """Tell the other tasks to end with this exit code; the first call counts."""
        for channel in self._channels.values():
            channel.send({"end": code})
            channel.finish_sending()

    def _read(self, task: int, channel: Channel) -> None:
        while (message := channel.receive()) is not None:
            try:
                outcome = Outcome(int(message["code"]), StageResult.model_validate(message["result"]))
            except (KeyError, TypeError, ValueError):
                break
            if outcome.code not in _ENDED:
                self._failed.set()
            self._answers[task].put(outcome)
        self._failed.set()
        self._answers[task].put(None)

    def _lost(self, stage: StageName, task: int) -> Outcome:
        message = f"task {task} of {self.place.tasks} is gone; look at its log, then start the run again"
        result = StageResult(stage=stage, outcome="failed", reason="TaskLost", message=message)
        return Outcome(ExitCode.UNAVAILABLE, result)


class Follower:
    """A task other than 0: does what task 0 says. `code` is the run's exit code, once `orders` has ended."""

    def __init__(self, place: Place, channel: Channel) -> None:
        self.place, self._channel = place, channel
        self.code: int = ExitCode.UNAVAILABLE
        self._orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._failed = threading.Event()
        threading.Thread(target=self._read, name="task 0", daemon=True).start()

    def orders(self) -> Iterator[tuple[StageName, int]]:
        """The stages to run, each with the port where its ranks meet, until the run ends."""
        while (order := self._orders.get()) is not None and "end" not in order:
            yield order["stage"], int(order["port"])
        self.code = ExitCode.UNAVAILABLE if order is None else int(order["end"])

    def have_failed(self) -> bool:
        """Whether task 0 is gone or ended the stage."""
        return self._failed.is_set()

    def answer(self, outcome: Outcome) -> None:
        """Tell task 0 how the stage ended here."""
        self._channel.send({"code": outcome.code, "result": outcome.result.to_dict()})

    def _read(self) -> None:
        while (message := self._channel.receive()) is not None:
            if "stop" in message:
                self._failed.set()
            else:
                self._failed.clear()
                self._orders.put(message)
        self._failed.set()
        self._orders.put(None)


@contextmanager
def lead(place: Place, limit: float = MEETING_SECONDS) -> Iterator[Leader]:
    """Within the block, the other tasks are connected. Raises Unavailable when they do not come in time."""
    with _listen(place) as listener:
        leader = Leader(place, _gather(place, listener, limit))
    try:
        yield leader
    finally:
        leader.end(ExitCode.INTERNAL)  # no effect after an earlier call


def _listen(place: Place) -> socket.socket:
    try:
        return socket.create_server(("", place.port), backlog=max(128, place.tasks))
    except OSError as error:
        raise Unavailable(
            "PortNotUsable",
            f"task 0 cannot listen at port {place.port} of this machine ({error.strerror}); set MASTER_PORT to another "
            "port, the same for every task",
        ) from error


def _gather(place: Place, listener: socket.socket, limit: float) -> dict[int, Channel]:
    """A connection to each other task; a stranger's is closed."""
    channels: dict[int, Channel] = {}
    until = time.monotonic() + limit
    while missing := [task for task in range(1, place.tasks) if task not in channels]:
        listener.settimeout(max(0.01, until - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except TimeoutError as error:
            raise Unavailable(
                "RendezvousTimeout",
                f"task(s) {', '.join(map(str, missing[:10]))} of {place.tasks} did not come to "
                f"{place.host}:{place.port} within {limit:.0f} s; in an sbatch script write `srun internvl-trainer run "
                "RUN.YAML`, which starts them all",
            ) from error
        connection.settimeout(_HELLO_SECONDS)
        line = b""
        with suppress(OSError):
            line = connection.makefile("rb").readline(_LONGEST_LINE)
        task = _task_of(line, place.run)
        if task in missing:
            channels[task] = Channel(connection)
        else:
            connection.close()
    return channels


def _task_of(line: bytes, run: str) -> int | None:
    with suppress(*_NO_MESSAGE):
        hello = json.loads(line)
        if isinstance(hello, dict) and hello.get("run") == run and isinstance(hello.get("task"), int):
            return int(hello["task"])
    return None


@contextmanager
def follow(place: Place, limit: float = MEETING_SECONDS) -> Iterator[Follower]:
    """Within the block, this task is connected to task 0. Raises Unavailable when it cannot be reached in time."""
    channel = Channel(_connect(place, limit))
    channel.send({"run": place.run, "task": place.task})
    try:
        yield Follower(place, channel)
    finally:
        channel.close()


def _connect(place: Place, limit: float) -> socket.socket:
    until = time.monotonic() + limit
    while True:
        try:
            return socket.create_connection((place.host, place.port), timeout=_HELLO_SECONDS)
        except OSError as error:
            if time.monotonic() > until:
                raise Unavailable(
                    "RendezvousTimeout",
                    f"task {place.task} could not reach task 0 at {place.host}:{place.port} within {limit:.0f} s "
                    f"({error}); set MASTER_ADDR and MASTER_PORT to an address and a free port of its machine",
                ) from error
            time.sleep(_RETRY_SECONDS)

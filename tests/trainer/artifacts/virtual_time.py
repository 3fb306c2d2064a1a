"""Threads in virtual time: one runs at a time, chosen by a seed, and a wait costs nothing."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from random import Random


class Killed(BaseException):
    """Raised in a killed actor wherever it waits; no handler for Exception sees it."""


class Actor:
    """A thread of the simulation; it runs only while the simulation waits for it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.turn, self.killed, self.ended = threading.Semaphore(0), False, False


class VirtualLock:
    """A lock whose waiters wait in virtual time; with a real one the whole simulation would stand still."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation, self._taken = simulation, False

    def __enter__(self) -> None:
        while self._taken:
            self._simulation.pause(0.05)
        self._taken = True

    def __exit__(self, *_: object) -> None:
        self._taken = False


class Simulation:
    """Runs actors until all have ended. `pause` is their sleep, `now` their clock."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.time = 0.0
        self.errors: list[BaseException] = []
        self._waiting: list[tuple[float, float, int, Actor]] = []
        self._order = itertools.count()
        self._idle = threading.Semaphore(0)
        self._current: Actor | None = None
        self._actors: dict[str, Actor] = {}

    def now(self) -> float:
        """Seconds since the simulation began."""
        return self.time

    @property
    def current(self) -> Actor:
        """The actor that runs now."""
        assert self._current is not None
        return self._current

    def start(self, name: str, work: Callable[[], object], after: float = 0.0) -> Actor:
        """A new actor that does `work`."""
        actor = self._actors[name] = Actor(name)

        def run() -> None:
            actor.turn.acquire()
            try:
                if not actor.killed:
                    work()
            except Killed:
                pass
            except BaseException as error:  # noqa: BLE001 shown by the test
                self.errors.append(error)
            actor.ended = True
            self._idle.release()

        threading.Thread(target=run, daemon=True).start()
        self._push(actor, after)
        return actor

    def pause(self, seconds: float) -> None:
        """Let others run for so long; raises Killed in an actor that was killed meanwhile."""
        actor = self.current
        self._push(actor, seconds)
        self._idle.release()
        actor.turn.acquire()
        if actor.killed:
            raise Killed

    def kill(self, name: str) -> None:
        """End an actor where it waits now."""
        self._actors[name].killed = True

    def run(self, limit: float) -> None:
        """Until every actor has ended; an error of one is raised here."""
        try:
            while self._waiting:
                self.time, _, _, self._current = heapq.heappop(self._waiting)
                assert self.time < limit, f"{self._current.name} goes on at {self.time:.0f} s"
                self._resume()
                if self.errors:
                    raise self.errors[0]
        finally:
            for *_, actor in self._waiting:  # after an error
                self._current, actor.killed = actor, True
                self._resume()

    def _resume(self) -> None:
        self.current.turn.release()
        self._idle.acquire()

    def _push(self, actor: Actor, seconds: float) -> None:
        heapq.heappush(self._waiting, (self.time + seconds, self.random.random(), next(self._order), actor))

"""Serve GET /healthz (liveness) and /readyz (standing by or working) from a separate thread.

The thread watches the event loop from outside: a coroutine records a beat each second, and its delay is the lag.
"""

import asyncio
import time
from collections.abc import Callable, Iterable

from internvl_operator import metrics
from internvl_operator.http_server import Handler, Server

_BEAT = 1.0  # seconds between two beats of the event loop
_LONGEST_LAG = 30.0  # seconds after which the event loop counts as hung

Problems = Callable[[], Iterable[str]]


class Health:
    """Collects the problems of all parts. `not_ready`: the reason, or None when ready."""

    def __init__(self) -> None:
        self.not_ready: str | None = "starting"
        self._parts: list[Problems] = []
        self._conditions: list[Callable[[], str | None]] = []
        self._beat: float | None = None

    def watch(self, problems: Problems) -> None:
        """Include the problems of another part in every probe."""
        self._parts.append(problems)

    def require(self, not_ready: Callable[[], str | None]) -> None:
        """Include another part in every readiness probe: the reason why it is not ready, or None."""
        self._conditions.append(not_ready)

    def problems(self) -> list[str]:
        """Problems that a restart would fix."""
        lag = self._lag()
        late = [f"the event loop has not answered for {lag:.0f} s"] if lag > _LONGEST_LAG else []
        return late + [problem for part in self._parts for problem in part()]

    async def beat(self) -> None:
        """Record the beats; runs in the event loop as long as the loop does."""
        while True:
            metrics.LOOP_LAG.set(self._lag())
            self._beat = time.monotonic()
            await asyncio.sleep(_BEAT)

    def serve(self, port: int) -> Server:
        """Start answering probes. Raises OSError when the port cannot be opened."""
        health = self

        class Probes(Handler):
            def do_GET(self) -> None:
                status, text = health.answer(self.path)
                self.answer(status, text.encode())

        return Server(port, Probes, name="health").start()

    def answer(self, path: str) -> tuple[int, str]:
        """HTTP status and body for a GET."""
        path = path.partition("?")[0]
        if path not in ("/healthz", "/readyz"):
            return 404, "GET /healthz or /readyz\n"
        problems = self.problems()
        if path == "/readyz":
            problems += filter(None, [self.not_ready, *(not_ready() for not_ready in self._conditions)])
        return (503, "; ".join(problems) + "\n") if problems else (200, "ok\n")

    def _lag(self) -> float:
        return 0.0 if self._beat is None else max(0.0, time.monotonic() - self._beat - _BEAT)

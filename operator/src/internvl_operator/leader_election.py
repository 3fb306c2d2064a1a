"""Leader election: one replica holds and renews the Lease; the others take it when it has stopped changing.

No two machines' clocks are compared. A candidate waits until the Lease has not changed for its whole duration, by the
candidate's clock, from the last change it saw. The holder stops writing after two thirds of the duration, by its own
clock, from the last successful renewal it sent. The holder's wait starts earlier and is shorter, so it stops before a
candidate starts, whatever the clocks show (only their rates must agree to a third).
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from internvl_operator import metrics
from internvl_operator.kube.client import ApiError
from internvl_operator.kube.lease import Record

_RENEW_WITHIN = 2 / 3  # of the duration; then the holder stops writing
_TRY_EVERY = 2 / 15  # of the duration; 2 s of 15
_HANGS = 4  # durations without a try; the thread hangs

logger = logging.getLogger(__name__)


def steady() -> float:
    """Seconds of a clock that also counts while the machine sleeps, where the system has one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class LeaseStore(Protocol):
    """The part of `kube.lease.LeaseClient` that the election needs."""

    def get(self, timeout: float) -> Record | None: ...
    def write(self, before: Record | None, holder: str, seconds: float, timeout: float) -> Record: ...


class Leadership:
    """`acquire`, then work while `time_left()` is positive; `lost` is called once when the lead is lost."""

    def __init__(
        self,
        lease: LeaseStore,
        identity: str,
        seconds: float,
        lost: Callable[[str], None],
        clock: Callable[[], float] = steady,
    ) -> None:
        self.identity, self._lease, self._seconds = identity, lease, seconds
        self._lost, self._clock = lost, clock
        self._every = seconds * _TRY_EVERY
        self._seen: Record | None = None
        self._seen_at = self._tried = clock()
        self._until = 0.0  # by our clock; no write after this
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="leader", daemon=True)

    def acquire(self, stop: threading.Event) -> bool:
        """Stand by until this replica holds the Lease (True; a thread renews it) or is told to stop (False)."""
        follows = None
        while not stop.is_set():
            try:
                if self.attempt():
                    logger.info("leading as %s", self.identity)
                    metrics.LEADER.set(1)
                    self._thread.start()
                    return True
                holder = self._seen.holder if self._seen else ""
                if holder != follows:
                    logger.info("standing by: %s leads", holder or "nobody")
                    follows = holder
            except ApiError as error:
                logger.warning("cannot read or take the Lease: %s; retrying every %.1f s", error, self._every)
            stop.wait(self._every)
        return False

    def attempt(self) -> bool:
        """Take or renew the Lease if allowed; True when this replica holds it. Raises ApiError."""
        self._tried = began = self._clock()
        found = self._lease.get(self._timeout())
        if found is None or self._seen is None or found.version != self._seen.version:
            self._seen, self._seen_at = found, self._clock()
        if found and found.holder not in ("", self.identity) and self._clock() < self._seen_at + found.seconds:
            return False
        try:
            self._seen = self._lease.write(found, self.identity, self._seconds, self._timeout())
        except ApiError as error:
            if error.status == 409:  # another replica wrote first
                return False
            raise
        self._seen_at = self._clock()
        self._until = began + self._seconds * _RENEW_WITHIN
        return self.time_left() > 0

    def time_left(self) -> float:
        """Seconds for which no other replica can take the Lease; 0 or less when writing is forbidden."""
        return self._until - self._clock()

    def release(self) -> None:
        """Give the Lease back, so that another replica leads at once. Call when no thread writes; never raises."""
        self._released.set()
        self._thread.join(timeout=self._timeout())
        held, self._until = self._seen, 0.0
        metrics.LEADER.set(0)
        try:
            self._lease.write(held, "", 1, self._timeout())
        except ApiError as error:
            logger.info("cannot release the Lease: %s; it expires by itself", error)

    def problem(self) -> str | None:
        """Why the process should be restarted; else None."""
        idle = self._clock() - self._tried
        return f"the Lease was not checked for {idle:.0f} s" if idle > _HANGS * self._seconds else None

    def _keep(self) -> None:
        """Renew until released or lost."""
        why = ""
        while not self._released.wait(self._every):
            try:
                if self.time_left() > 0 and not self.attempt():
                    why = f"{self._seen.holder if self._seen else 'nobody'} has the Lease"
                    self._until = 0.0
            except ApiError as error:
                why = str(error)
                logger.warning("cannot renew the Lease, %.1f s left: %s", self.time_left(), error)
            if self.time_left() <= 0:
                metrics.LEADER.set(0)
                self._lost(why or "it was not renewed in time")
                return

    def _timeout(self) -> float:
        """Time-out of one request: after this long, another try is more useful."""
        return max(1.0, self._seconds / 3)

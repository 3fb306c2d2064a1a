"""Leader election: one replica holds and renews the Lease; the others take it when it has stopped changing.

No clock is compared with another machine's: a candidate waits until the Lease has not changed for its whole duration,
by the candidate's own clock since it saw the last change; the holder gives up after two thirds of the duration, by
its own clock since it sent the last renewal that succeeded. The holder's wait began earlier and is shorter, so it has
stopped writing before anybody else begins, whatever their clocks say (only their rates must agree to a third).
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from internvl_operator import metrics
from internvl_operator.kube.client import ApiError
from internvl_operator.kube.lease import Record

_RENEW_WITHIN = 2 / 3  # of the duration: then the holder gives up
_TRY_EVERY = 2 / 15  # of the duration: 2 s of 15
_HANGS = 4  # durations without a try: the thread hangs

logger = logging.getLogger(__name__)


def steady() -> float:
    """Seconds that also pass while the machine sleeps, where the system can say."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class LeaseStore(Protocol):
    """What `kube.lease.LeaseClient` does."""

    def get(self, timeout: float) -> Record | None: ...
    def write(self, before: Record | None, holder: str, seconds: float, timeout: float) -> Record: ...


class Leadership:
    """`acquire`, then work for as long as `time_left()` is positive; `lost` is called once when it is over."""

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
        self._until = 0.0  # by our clock: no write after this
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="leader", daemon=True)

    def acquire(self, stop: threading.Event) -> bool:
        """Stand by until the Lease is ours (True, and it is renewed from now on) or until told to stop (False)."""
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
                logger.warning("the Lease could not be read or taken: %s", error)
            stop.wait(self._every)
        return False

    def attempt(self) -> bool:
        """Take or renew the Lease if it may be taken; whether it is ours now. Raises ApiError."""
        self._tried = began = self._clock()
        found = self._lease.get(self._timeout())
        if found is None or self._seen is None or found.version != self._seen.version:
            self._seen, self._seen_at = found, self._clock()
        if found and found.holder not in ("", self.identity) and self._clock() < self._seen_at + found.seconds:
            return False
        try:
            self._seen = self._lease.write(found, self.identity, self._seconds, self._timeout())
        except ApiError as error:
            if error.status == 409:  # somebody was faster
                return False
            raise
        self._seen_at = self._clock()
        self._until = began + self._seconds * _RENEW_WITHIN
        return self.time_left() > 0

    def time_left(self) -> float:
        """Seconds for which nobody else can have the Lease, by the last renewal; at most 0 when writing is over."""
        return self._until - self._clock()

    def release(self) -> None:
        """Let another begin at once. Only when nothing here writes any more. Raises nothing."""
        self._released.set()
        self._thread.join(timeout=self._timeout())
        held, self._until = self._seen, 0.0
        metrics.LEADER.set(0)
        try:
            self._lease.write(held, "", 1, self._timeout())
        except ApiError as error:
            logger.info("the Lease was not given back, and will run out: %s", error)

    def problem(self) -> str | None:
        """Why the process should be restarted, if it should."""
        idle = self._clock() - self._tried
        return f"the Lease was not looked at for {idle:.0f} s" if idle > _HANGS * self._seconds else None

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
                logger.warning("the Lease could not be renewed, %.1f s are left: %s", self.time_left(), error)
            if self.time_left() <= 0:
                metrics.LEADER.set(0)
                self._lost(why or "it was not renewed in time")
                return

    def _timeout(self) -> float:
        """Of one request: a renewal that takes longer than this is of no use, and another try may be."""
        return max(1.0, self._seconds / 3)

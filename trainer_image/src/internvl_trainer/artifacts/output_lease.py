"""The lease of an output: one stage of one run writes to spec.output, until it ends or a later attempt begins.

lease.json names the holder; the holder renews it. Clocks of different machines are never compared: a waiting process
watches, by its own clock, whether the file changes. docs/reliability.md explains the rules to users.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

from internvl_trainer.artifacts.lease_record import Lease, Owner, has_ended, parse_lease
from internvl_trainer.artifacts.output_layout import LEASE_FILE
from internvl_trainer.artifacts.storage import ConditionsUnsupported, Storage, Tagged
from internvl_trainer.errors import LeaseLost, UserError

logger = logging.getLogger(__name__)

_ATTEMPTS = 5  # at a renewal whose answers contradict each other


@dataclass(frozen=True)
class Timing:
    """Durations in seconds.

    Attributes:
        live: how long a holder may write after its last renewal.
        beat: between two renewals.
        grace: how much longer others wait, for a request in flight.
        poll: between two reads of a waiting process.
        settle: between taking the lease and reading it back, where storage has no conditional writes.
    """

    live: float = 30.0
    beat: float = 10.0
    grace: float = 10.0
    poll: float = 1.0
    settle: float = 5.0

    @property
    def stale(self) -> float:
        """How long a lease must stay unchanged before another run takes it."""
        return self.live + self.grace


_TIMING = Timing()


class OutputLease:
    """One acquisition of the lease of `storage`. `now`, `sleep`: this machine's clock; `tell`: called with progress.

    `renew` and `confirm` may be called from several threads.
    """

    def __init__(
        self,
        storage: Storage,
        owner: Owner,
        *,
        timing: Timing = _TIMING,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        tell: Callable[[str], object] = logger.info,
    ) -> None:
        self.timing = timing
        self._storage, self._owner, self._now, self._sleep, self._tell = storage, owner, now, sleep, tell
        self._lock = threading.Lock()
        self._held = Lease(owner, uuid.uuid4().hex, epoch=0)
        self._tag: str | None = None
        self._writes_on_condition = True
        self._valid_until = -1.0
        self._lost: LeaseLost | None = None

    @property
    def epoch(self) -> int:
        """The number of this acquisition; larger than that of every earlier one."""
        return self._held.epoch

    def acquire(self, *, check: Callable[[], object] = lambda: None) -> None:
        """Take the lease, at once or when its holder is known to have ended.

        `check` is called once if the lease there is not of an earlier stage or attempt of this run: it may raise, so
        that nothing is written into a foreign output.

        Raises:
            UserError: `OutputInUse`, another run is writing there.
            LeaseLost: a later attempt of this run is writing there.
        """
        watch = _Watch(self._owner, self.timing.stale)
        found, lease = self._read()
        if lease is None or lease.owner.run != self._owner.run:
            check()
        while True:
            if found is None or self._may_take(lease) or watch.is_stale(lease, found.tag, self._now()):
                if self._take(lease, found.tag if found else None):
                    return
            else:
                watch.refuse_live(self._storage.uri)
                if watch.is_new:
                    self._tell(watch.describe())
                self._sleep(self.timing.poll)
            found, lease = self._read()

    def renew(self) -> None:
        """Renew the lease. Raises LeaseLost, or Unavailable when storage does not answer."""
        with self._lock:
            for _ in range(_ATTEMPTS):
                self.check()
                began = self._now()
                if self._put(replace(self._held, beat=self._held.beat + 1)):
                    self._valid_until = began + self.timing.live
                    return
                self._find_conflict()
            raise self._lose(None)

    def confirm(self) -> None:
        """Return only if storage says that this process holds the lease. Raises as `renew` does."""
        self.check()
        # Valid after the request too: it may have taken long.
        if not (self._is_valid() and self._is_stored() and self._is_valid()):
            self.renew()

    def check(self) -> None:
        """Raise LeaseLost when this process is known to have lost the lease; sends no request."""
        if self._lost is not None:
            raise self._lost

    def release(self, *, finished: bool = False) -> None:
        """Let the next stage or run begin without waiting. Raises as `renew` does."""
        with self._lock:
            self.check()
            self._put(replace(self._held, beat=self._held.beat + 1, released=True, finished=finished))
            self._lost = LeaseLost("OutputLeaseLost", "the stage has released the lease of its output", "spec.output")

    def _may_take(self, lease: Lease | None) -> bool:
        """Whether the lease can be taken at once: its holder has ended, or this is a later attempt of its run."""
        if lease is None:
            return False
        if lease.released:
            return lease.finished or lease.owner.run == self._owner.run
        process = lease.owner.process
        # A process runs one stage at a time: its own earlier one has ended.
        is_own = process is not None and process == self._owner.process
        return is_own or lease.owner.is_earlier_attempt(self._owner) or has_ended(process)

    def _take(self, before: Lease | None, tag: str | None) -> bool:
        mine = replace(self._held, epoch=(before.epoch if before else 0) + 1)
        if tag is None:
            next(self._storage.list(LEASE_FILE), None)  # names a missing bucket; some servers make one on write
        self._tag, began = tag, self._now()
        if not self._put(mine):
            return False
        if self._writes_on_condition:
            self._check_conditions(tag)
        if not self._writes_on_condition:
            self._sleep(self.timing.settle)
            if not self._is_stored():
                return False
            began = self._now()
        self._valid_until = began + self.timing.live
        return True

    def _check_conditions(self, earlier_tag: str | None) -> None:
        """Detect a server that ignores conditions: it stores a write whose condition is false."""
        next_beat = replace(self._held, beat=self._held.beat + 1)
        tag = self._storage.replace(LEASE_FILE, next_beat.encode(), expected=earlier_tag)
        if tag is not None:
            self._held, self._tag = next_beat, tag
            self._do_without_conditions(f"{self._storage.uri}: the server ignores If-Match and If-None-Match")

    def _do_without_conditions(self, why: str) -> None:
        self._writes_on_condition = False
        logger.warning(
            "%s; so a stage waits %.0f s after it takes the output, and checks whether another run has taken it too. "
            "Two runs that start with the same output within one slow request may still both write",
            why, self.timing.settle,
        )  # fmt: skip

    def _put(self, lease: Lease) -> bool:
        """Store `lease` unless another holder has stored one since; returns whether it is stored."""
        data = lease.encode()
        if self._writes_on_condition:
            try:
                tag = self._storage.replace(LEASE_FILE, data, expected=self._tag)
            except ConditionsUnsupported as error:
                self._do_without_conditions(str(error))
            else:
                if tag is not None:
                    self._held, self._tag = lease, tag
                return tag is not None
        found, stored = self._read()
        if (found.tag if found else None) != self._tag and (stored is None or stored.holder != lease.holder):
            return False
        self._storage.write(LEASE_FILE, data)
        self._held, found = lease, self._storage.read_tagged(LEASE_FILE)
        self._tag = found.tag if found else None
        return True

    def _find_conflict(self) -> None:
        """Find out why a renewal was refused. Raises LeaseLost when another holder has taken the lease."""
        found, lease = self._read()
        if found is not None and (lease is None or lease.holder != self._held.holder):
            raise self._lose(lease)
        self._tag = found.tag if found else None  # an earlier renewal arrived late, or a user deleted the file
        if lease is not None:
            self._held = replace(self._held, beat=max(self._held.beat, lease.beat))

    def _is_valid(self) -> bool:
        return self._now() < self._valid_until

    def _is_stored(self) -> bool:
        _, lease = self._read()
        return lease is not None and lease.holder == self._held.holder

    def _read(self) -> tuple[Tagged | None, Lease | None]:
        """The stored file and the lease in it; the lease is None when the file cannot be understood."""
        found = self._storage.read_tagged(LEASE_FILE)
        return found, parse_lease(found.data) if found else None

    def _lose(self, other: Lease | None) -> LeaseLost:
        who = other.owner.describe() if other else "another writer"
        self._lost = LeaseLost(
            "OutputLeaseLost",
            f"{who} has taken {self._storage.uri}; {self._owner.describe()} no longer writes there. Its complete "
            "checkpoints stay",
            "spec.output",
        )
        return self._lost


class _Watch:
    """What a waiting process has seen of a lease so far."""

    def __init__(self, owner: Owner, stale: float) -> None:
        self._owner, self._stale = owner, stale
        self._tag: str | None = None
        self._since = 0.0
        self._seen: Lease | None = None
        self._is_live = False
        self.is_new = False

    def is_stale(self, lease: Lease | None, tag: str, now: float) -> bool:
        """Note the stored lease; returns whether it has stayed unchanged for long enough."""
        self.is_new = tag != self._tag
        if self.is_new:
            self._is_live = self._tag is not None and not (lease and lease.released)
            self._tag, self._since, self._seen = tag, now, lease
        return now - self._since >= self._stale

    def refuse_live(self, uri: str) -> None:
        """Raise UserError OutputInUse, or LeaseLost, if the lease was renewed while it was watched."""
        if not self._is_live:
            return
        who = self._seen.owner.describe() if self._seen else "a program of another version"
        if self._seen and self._seen.owner.is_later_attempt(self._owner):
            message = f"{who} is writing to {uri}; {self._owner.describe()} has been replaced and stops"
            raise LeaseLost("OutputLeaseLost", message, "spec.output")
        if self._seen and self._seen.owner.run == self._owner.run:
            step = "it is an earlier run or a second process of this name; this one continues when that one has ended"
        else:
            step = (
                f"choose another output for {self._owner.run}, or suspend or delete that run: this one then continues "
                "by itself"
            )
        raise UserError("OutputInUse", f"{who} is writing to {uri}; {step}", "spec.output")

    def describe(self) -> str:
        """Text for the progress: what the process waits for, and how long at most."""
        if self._seen is None:
            return f"waiting up to {self._stale:.0f} s: the output's lease.json cannot be read"
        if self._seen.released:
            return f"waiting {self._stale:.0f} s: {self._seen.owner.describe()} may go on with its next stage"
        return f"waiting up to {self._stale:.0f} s: {self._seen.owner.describe()} has not released the output"

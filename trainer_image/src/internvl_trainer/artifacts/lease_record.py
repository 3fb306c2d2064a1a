"""The content of lease.json: which attempt of which run may write to an output."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from internvl_api.constants import ENV_ADOPTED_UIDS, ENV_ATTEMPT
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName

_PROC = Path("/proc")
_LONGEST = 200  # characters of a text that is shown; another program may have written the file


@dataclass(frozen=True)
class Owner:
    """Who asks for the lease.

    Attributes:
        attempt: the operator's; None on a single machine, where nobody numbers the attempts of a run.
        process: which process of which machine; None where /proc does not say.
        adopted: uids of earlier runs of this name whose pods the run has adopted.
    """

    run: str
    uid: str
    stage: str
    attempt: int | None
    process: str | None
    adopted: tuple[str, ...] = ()

    @classmethod
    def of_this_process(cls, config: RunConfig, stage: StageName) -> Owner:
        """The owner that this process is, as a stage of a run."""
        attempt, adopted = os.environ.get(ENV_ATTEMPT), os.environ.get(ENV_ADOPTED_UIDS)
        return cls(
            config.job,
            config.job_uid,
            stage,
            int(attempt) if attempt else None,
            describe_process(os.getpid()),
            tuple(adopted.split(",")) if adopted else (),
        )

    def describe(self) -> str:
        """Text for messages: `stage train of run team/pets (attempt 2)`."""
        attempt = f" (attempt {self.attempt})" if self.attempt is not None else ""
        return f"stage {self.stage} of run {self.run}{attempt}"

    def is_earlier_attempt(self, other: Owner) -> bool:
        """Whether this is an attempt of the run of `other` that the operator has ended; also the same attempt."""
        if self.attempt is None or other.attempt is None or self.run != other.run:
            return False
        return self.uid in other.adopted or (self.uid == other.uid and self.attempt <= other.attempt)

    def is_later_attempt(self, other: Owner) -> bool:
        """Whether the operator has begun this attempt after that of `other`."""
        if self.attempt is None or other.attempt is None:
            return False
        return self.uid == other.uid and self.run == other.run and self.attempt > other.attempt


@dataclass(frozen=True)
class Lease:
    """The stored lease.

    Attributes:
        holder: a random id of one acquisition.
        epoch: one more with each acquisition; names the folders of checkpoints.
        beat: one more with each renewal.
        released: the stage has ended and writes no more.
        finished: the run has published; nobody waits for its next stage.
    """

    owner: Owner
    holder: str
    epoch: int
    beat: int = 0
    released: bool = False
    finished: bool = False

    def encode(self) -> bytes:
        """The content of the file; its time is for people, programs never compare it."""
        document = asdict(self) | {"version": 1, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        return json.dumps(document, indent=1, sort_keys=True).encode()


def parse_lease(data: bytes) -> Lease | None:
    """The lease in a file's content; None for anything else."""
    try:
        document = json.loads(data)
        owner = document["owner"]
        return Lease(
            owner=Owner(
                run=_text(owner["run"]),
                uid=_text(owner["uid"]),
                stage=_text(owner["stage"]),
                attempt=None if owner["attempt"] is None else int(owner["attempt"]),
                process=None if owner["process"] is None else _text(owner["process"]),
            ),
            holder=_text(document["holder"]),
            epoch=int(document["epoch"]),
            beat=int(document["beat"]),
            released=bool(document["released"]),
            finished=bool(document["finished"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def describe_process(number: int) -> str | None:
    """An identity that no two processes share: boot, process namespace, number and start time."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink(_PROC / "self/ns/pid")
        return f"{boot} {namespace} {number} {_state_and_start(number)[1]}"
    except (OSError, ValueError, IndexError):
        return None


def has_ended(process: str | None) -> bool:
    """Whether `process` has certainly ended. False for a process of another machine or container."""
    own, parts = describe_process(os.getpid()), (process or "").split()
    if own is None or len(parts) != 4 or parts[:2] != own.split()[:2] or not parts[2].isdecimal():
        return False
    try:
        os.kill(int(parts[2]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    try:
        state, start = _state_and_start(int(parts[2]))
    except FileNotFoundError:
        return True
    except (OSError, ValueError, IndexError):
        return False
    return state in ("Z", "X") or start != parts[3]


def _state_and_start(process: int) -> tuple[str, str]:
    """Fields 3 and 22 of /proc/PID/stat (proc_pid_stat(5)); the second field may hold spaces and parentheses."""
    fields = (_PROC / str(process) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return fields[0], fields[19]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"found {value!r}, expected a text")
    return value[:_LONGEST]

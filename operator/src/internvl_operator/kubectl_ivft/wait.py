"""Wait until a run ends; unlike `kubectl wait --for=condition=…` it returns for every end."""

import time
from collections.abc import Callable
from typing import Any, Literal

from internvl_operator.core.run import read_status
from internvl_operator.kubectl_ivft.client import Runs, Unreachable, UserError

Raw = dict[str, Any]
Tell = Callable[[str], None]
End = Literal["Succeeded", "Failed", "Suspended"]
EXIT_CODES: dict[End, int] = {"Succeeded": 0, "Failed": 3, "Suspended": 4}  # 1 is an error, 2 a wrong command line
TIMED_OUT = 5
_PAUSE = 2.0  # seconds between two looks
_PATIENCE = 60.0  # seconds without an answer of the API server


def end_of(raw: Raw) -> End | None:
    """How the run has ended; None while it has not, or while the operator has not read its newest spec."""
    status = read_status(raw.get("status") or {})
    if status.observed_generation != raw["metadata"].get("generation", 1):
        return None
    return next((end for end in EXIT_CODES if status.phase == end), None)


def wait(
    runs: Runs,
    name: str,
    *,
    timeout: float | None,
    tell: Tell,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """The exit code for the run's end. `timeout`: seconds, or None; `tell` gets one line for each change.

    Raises:
        UserError: There is no such run, it was deleted, or the API server has not answered for a minute.
    """
    began = answered = clock()
    line, raw = "", runs.get(name)
    uid = raw["metadata"]["uid"]
    while True:
        if raw["metadata"]["uid"] != uid:
            raise UserError(f"the run {name!r} was deleted, and another one of this name was created")
        before, line = line, _line(raw)
        if line != before:
            tell(line)
        if end := end_of(raw):
            return EXIT_CODES[end]
        if timeout is not None and clock() - began >= timeout:
            return TIMED_OUT
        pause(_PAUSE)
        try:
            raw, answered = runs.get(name), clock()
        except Unreachable:
            if clock() - answered >= _PATIENCE:
                raise


def _line(raw: Raw) -> str:
    """`Running, train: 2 of 2 workers run`: phase and the message of the Ready condition."""
    status = read_status(raw.get("status") or {})
    ready = next((condition for condition in status.conditions if condition.type == "Ready"), None)
    return f"{status.phase or 'Pending'}, {ready.message}" if ready and ready.message else status.phase or "Pending"

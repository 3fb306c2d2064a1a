"""The exceptions that tell the user what to correct, and how the process then exits."""

from __future__ import annotations

from internvl_api.status import StageResult


class UserError(Exception):
    """A mistake in the user's input: shown as a message, never as a traceback.

    Args:
        reason: CamelCase word for a condition or a metric label, such as `MissingShard`.
        message: what was found, what was expected, and the next step.
        where: the file, line or field it is about, where there is one.
    """

    def __init__(self, reason: str, message: str, where: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class AccessDenied(UserError):
    """The server refused the credentials; correct the Secret and start again."""


class Unavailable(UserError):
    """Storage or network did not answer; starting again later may help."""


class LeaseLost(UserError):
    """Another attempt or run holds the lease of the output; this process must not write there any more."""


class BadFile(UserError):
    """A data file that must not or cannot be read: a finding of its row, which does not end the run."""


class Rejected(UserError):
    """The work is done, and its result does not meet publishIf; `result` names what was made."""

    def __init__(self, result: StageResult) -> None:
        super().__init__(result.reason, result.message)
        self.result = result


def first_line(error: Exception) -> str:
    """The kind of an exception that nobody expected, and the beginning of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"

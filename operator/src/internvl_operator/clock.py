"""The clock of the operator's shell and of kubectl ivft; they pass the time to the core."""

from datetime import UTC, datetime


def utc_now() -> datetime:
    """This machine's time, in UTC."""
    return datetime.now(UTC)

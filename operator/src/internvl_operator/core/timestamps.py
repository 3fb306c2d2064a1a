"""Kubernetes timestamps (RFC 3339, UTC, whole seconds) to and from aware datetimes."""

from datetime import UTC, datetime


def to_text(moment: datetime) -> str:
    """`2026-01-31T12:00:00Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def from_text(text: object) -> datetime | None:
    """The moment; None when the text is missing or malformed."""
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):  # no date, or one beyond the calendar in UTC
        return None

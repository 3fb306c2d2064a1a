"""Format times and durations for people. Pure; `now` is passed in."""

from datetime import UTC, datetime

from internvl_operator.core.timestamps import from_text

_UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def duration(seconds: float) -> str:
    """The two largest units, as kubectl formats them.

    >>> duration(0.4), duration(45), duration(192), duration(7500), duration(270000)
    ('0s', '45s', '3m12s', '2h5m', '3d3h')
    """
    left = max(0, int(seconds))
    parts: list[tuple[str, int]] = []
    for unit, size in _UNITS:
        count, left = divmod(left, size)
        if count or parts:
            parts.append((unit, count))
    shown = [f"{count}{unit}" for unit, count in parts[:2] if count]
    return "".join(shown) or "0s"


def ago(moment: str | None, now: datetime) -> str:
    """`3m12s ago`; a dash without a moment."""
    when = from_text(moment)
    return f"{duration((now - when).total_seconds())} ago" if when else "-"


def age(moment: str | None, now: datetime) -> str:
    """`3m12s`; a dash without a moment."""
    return ago(moment, now).removesuffix(" ago")


def clock(moment: str | None, now: datetime) -> str:
    """UTC: `12:00:05`, preceded by the date when it is not today."""
    when = from_text(moment)
    if when is None:
        return "-"
    when, today = when.astimezone(UTC), now.astimezone(UTC).date()
    return f"{when:%H:%M:%S}" if when.date() == today else f"{when:%Y-%m-%d %H:%M:%S}"


def took(start: str | None, end: str | None, now: datetime) -> str:
    """The duration from start to end, or to now while the end is open."""
    begin = from_text(start)
    return duration(((from_text(end) or now) - begin).total_seconds()) if begin else ""

"""Times and figures in the words of the pages."""

from __future__ import annotations

from datetime import datetime, timedelta

from internvl_trainer.report.bootstrap import Interval


def duration(seconds: float | timedelta) -> str:
    """A duration in words: seconds, minutes or hours.

    >>> duration(42.3), duration(754), duration(14_580)
    ('42 s', '12 min 34 s', '4 h 3 min')
    """
    total = round(seconds.total_seconds() if isinstance(seconds, timedelta) else seconds)
    hours, minutes, rest = total // 3600, total % 3600 // 60, total % 60
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{total} s" if total else "below 1 s"


def figure(value: float | None) -> str:
    """A metric's value with the digits people quote."""
    return "–" if value is None else f"{value:.4f}"


def difference(before: float | None, after: float | None) -> str:
    """With its sign; empty unless both are known."""
    return "" if before is None or after is None else f"{after - before:+.4f}".replace("-", "−")


def interval(value: Interval | None) -> str:
    """From its lower to its upper bound; empty where there is none."""
    return "" if value is None else f"{value.low:+.4f} to {value.high:+.4f}".replace("-", "−")


def moment(value: datetime) -> str:
    """To the minute, in UTC."""
    return value.strftime("%Y-%m-%d %H:%M")

"""'Did you mean' for names a user mistyped."""

import difflib
from collections.abc import Sequence


def closest(found: str, known: Sequence[str]) -> str | None:
    """The known name that is most like what was found, in whatever case; None when none is close."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(found.lower(), list(lowered), n=1)
    return lowered[close[0]] if close else None


def did_you_mean(found: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is close."""
    name = closest(found, known)
    return f" (did you mean {name!r}?)" if name else ""

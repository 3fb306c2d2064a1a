"""'Did you mean' for names a user mistyped."""

import difflib
from collections.abc import Sequence


def did_you_mean(found: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is close."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(found.lower(), list(lowered), n=1)
    return f" (did you mean {lowered[close[0]]!r}?)" if close else ""

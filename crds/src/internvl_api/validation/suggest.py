"""'Did you mean' for mistyped names."""

import difflib
import json
from collections.abc import Sequence


def closest(found: str, known: Sequence[str]) -> str | None:
    """The known name most similar to `found`, ignoring case; None when none is close."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(found.lower(), list(lowered), n=1)
    return lowered[close[0]] if close else None


def prefix_or_closest(found: str, known: Sequence[str]) -> str | None:
    """The name that `cel_prefix_hint` suggests; where it suggests none, the closest."""
    one = found.lower()
    longer = (name for name in known if name.lower().startswith(one))
    shorter = (name for name in reversed(known) if one.startswith(name.lower()))
    return next(longer, None) or next(shorter, None) or closest(found, known)


def did_you_mean(found: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or "" when no known name is close."""
    name = closest(found, known)
    return f" (did you mean {name!r}?)" if name else ""


def cel_list(names: Sequence[str]) -> str:
    """CEL for a list of names."""
    return json.dumps(list(names))


def cel_prefix_hint(names: Sequence[str], hint: str, otherwise: str = "") -> str:
    """CEL for `hint` with the first name that begins with `self`, else the last that `self` begins with, ignoring case.

    Without such a name it is `otherwise`.
    """
    name, found, shown = "name.lowerAscii()", "self.lowerAscii()", f"map(name, {json.dumps(hint)}.format([name]))"
    longer = f"{cel_list(names)}.filter(name, {name}.startsWith({found})).{shown}"
    shorter = f"{cel_list(names[::-1])}.filter(name, {found}.startsWith({name})).{shown}"
    return f"({longer} + {shorter} + ['{otherwise}'])[0]"

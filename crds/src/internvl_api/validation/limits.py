"""Limits of every spec, whatever the schema of the API server let through: depth, number of values, length of a text.

They come before all other checks, so that these work on small values only. The walk is iterative: nesting cannot
exhaust the stack.
"""

from collections.abc import Iterator

from internvl_api.spec.kubernetes.container import MAX_VALUE
from internvl_api.validation.violations import Violation

MAX_DEPTH = 32  # levels of objects and lists; the deepest field of the schema has 14
MAX_TEXT = MAX_VALUE  # characters of a key or value; the longest useful text is that of an environment variable
MAX_VALUES = 50_000  # objects, lists, texts and numbers; a thousand datasets with every field have 12,000
_SHOWN = 5  # steps of a path in a message


def over_limits(raw: object) -> Violation | None:
    """The first violation of depth, length or number of values; None when all are within the limits."""
    todo: list[tuple[tuple[str, ...], object]] = [(("spec",), raw)]
    seen = 1
    while todo:
        path, value = todo.pop()
        if isinstance(value, str):
            if len(value) > MAX_TEXT:
                return _too_long(path, value)
        elif len(path) > MAX_DEPTH:
            return Violation(_field(path), f"nested deeper than {MAX_DEPTH} levels; remove the levels that have no use")
        elif isinstance(value, dict | list):
            seen += len(value)
            if seen > MAX_VALUES:
                return Violation("spec", f"found more than {MAX_VALUES:,} values in all; split the run")
            for key, part in _parts(value):
                if len(key) > MAX_TEXT:
                    return _too_long(path, key)
                todo.append(((*path, key), part))
    return None


def _parts(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, list):
        yield from ((f"[{position}]", part) for position, part in enumerate(value))


def _too_long(path: tuple[str, ...], text: str) -> Violation:
    return Violation(_field(path), f"found a text of {len(text):,} characters, expected at most {MAX_TEXT:,}")


def _field(path: tuple[str, ...]) -> str:
    shown = ".".join(step[:64] for step in path[:_SHOWN])
    return shown.replace(".[", "[") + ("…" if len(path) > _SHOWN else "")

"""Make text of others safe for a terminal: without escape sequences and control characters."""

import re
from typing import Any

from internvl_operator.core.telemetry import printable

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]")


def plain(text: str) -> str:
    """The text as it reads, whatever it would do to a terminal.

    >>> plain("a\\x1b[31mred\\x1b[0m\\x1b]0;title\\x07!")
    'ared!'
    """
    return printable(_ESCAPES.sub("", text) if "\x1b" in text else text)


def plain_line(line: bytes) -> bytes:
    """A line of a log."""
    return plain(line.decode(errors="replace")).encode()


def plain_object(raw: dict[str, Any]) -> dict[str, Any]:
    """A raw object whose metadata and status, the parts that are shown, are plain."""
    shown = {key: plain_value(raw[key]) for key in ("metadata", "status") if key in raw}
    return raw | shown


def plain_value(value: Any) -> Any:
    """A JSON value whose strings and keys are plain."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain(key): plain_value(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain_value(part) for part in value]
    return value

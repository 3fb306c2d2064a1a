"""Make text of others safe for a terminal: without escape sequences and control characters."""

from typing import Any

from internvl_operator.core.telemetry import printable


def plain_line(line: bytes) -> bytes:
    """A line of a log."""
    return printable(line.decode(errors="replace")).encode()


def plain_object(raw: dict[str, Any]) -> dict[str, Any]:
    """A raw object whose metadata and status, the parts that are shown, are plain."""
    shown = {key: plain_value(raw[key]) for key in ("metadata", "status") if key in raw}
    return raw | shown


def plain_value(value: Any) -> Any:
    """A JSON value whose strings and keys are plain."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): plain_value(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain_value(part) for part in value]
    return value

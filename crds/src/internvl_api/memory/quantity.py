"""Amounts of memory as text: `80Gi` as in Kubernetes, `80GB` or `80GiB` as in data sheets."""

import re

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY_UNITS = {"k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_PATTERN = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmgt]?)(?P<binary>i?)b?\s*", re.IGNORECASE)

GIB = 1024**3


def parse_bytes(text: str) -> int:
    """Bytes in `text`. Raises ValueError, with what is expected, for anything but a positive amount."""
    match = _PATTERN.fullmatch(text)
    unit = match["unit"].lower() if match else ""
    if match is None or (match["binary"] and not unit) or float(match["number"]) == 0:
        raise ValueError(f"found {text!r}, expected an amount of memory such as 80Gi or 80GB")
    return int(float(match["number"]) * (_BINARY_UNITS if match["binary"] else _UNITS)[unit])


def gib(amount: int) -> str:
    """Bytes as text: `61.2 GiB`."""
    return f"{amount / GIB:.1f} GiB"

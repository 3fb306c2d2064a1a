"""Quantities of Kubernetes, and amounts of memory: `80Gi` as in Kubernetes, `80GB` or `80GiB` as in data sheets."""

import re
from decimal import Decimal
from typing import Any

_NUMBER = r"(?P<number>[0-9]{1,18}(\.[0-9]{1,18})?)"
_PATTERN = re.compile(rf"\s*{_NUMBER}\s*(?P<unit>[kmgt]?)(?P<binary>i?)b?\s*", re.IGNORECASE)

GIB = 1024**3
_SUFFIXES = {unit: Decimal(1000) ** power for power, unit in enumerate(("n", "u", "m", "", *"kMGTPE"), start=-3)}
_SUFFIXES |= {f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", start=1)}


def parse_bytes(text: str) -> int:
    """Bytes in `text`. Raises ValueError, with what is expected, for anything but a positive amount."""
    match = _PATTERN.fullmatch(text)
    if match is None or (match["binary"] and not match["unit"]) or Decimal(match["number"]) == 0:
        raise ValueError(f"found {text[:80]!r}, expected an amount of memory such as 80Gi or 80GB")
    unit = f"{match['unit'].upper()}i" if match["binary"] else match["unit"].upper().replace("K", "k")
    return int(amount(match["number"] + unit))


def gib(amount: int) -> str:
    """Bytes as text: `61.2 GiB`."""
    return f"{amount / GIB:.1f} GiB"


def amount(quantity: Any) -> Decimal:
    """A quantity of Kubernetes as a number, for comparisons; infinity for text that is no quantity.

    >>> amount("512Mi") < amount("1e9") < amount("1Gi"), amount("100m") < amount(1)
    (True, True)
    """
    number, unit = re.findall(r"^(.*?)([A-Za-z]*)$", str(quantity))[0]
    try:
        return Decimal(number) * _SUFFIXES[unit]
    except (ArithmeticError, KeyError):
        return Decimal("Infinity")

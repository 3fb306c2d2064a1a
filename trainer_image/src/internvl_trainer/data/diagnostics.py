"""What is wrong with a row, as data: the same form for preflight, for encoding and for the list of skipped rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one row (or one dataset, when `line` is None). `line` counts from 1."""

    reason: str
    message: str
    field: str | None = None
    severity: Severity = "error"
    file: str | None = None
    line: int | None = None

    def at(self, file: str, line: int | None) -> Finding:
        """The same finding, with its place filled in."""
        return replace(self, file=file, line=line)

    def as_dict(self) -> dict[str, str | int | None]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        return ": ".join(part for part in (place, self.field, self.message) if part)

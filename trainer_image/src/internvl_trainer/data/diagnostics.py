"""Findings: what is wrong with a row or an annotation file, in one form for checks, errors and reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from rich.table import Table
from rich.text import Text

from internvl_trainer.terminal import printable

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One problem of one row, or of a whole annotation file when `line` is None.

    Attributes:
        reason: one CamelCase word.
        message: what was found, what is expected and what to do.
        field: the row's field, such as conversations[1].from.
        severity: an error keeps the row out of training; with a warning the row is used.
        line: counts from 1.
    """

    reason: str
    message: str
    field: str | None = None
    severity: Severity = "error"
    file: str | None = None
    line: int | None = None

    def at(self, file: str | None, line: int | None) -> Finding:
        """The same finding at another place."""
        return replace(self, file=file, line=line)

    def as_dict(self) -> dict[str, str | int | None]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        return ": ".join(part for part in (place, self.field, self.message) if part)


class RowError(Exception):
    """The row cannot become a sample; `findings` holds at least one error."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("; ".join(str(finding) for finding in findings))
        self.findings = list(findings)

    @classmethod
    def single(cls, reason: str, message: str, field: str) -> RowError:
        """An error with one finding."""
        return cls([Finding(reason, message, field)])


def errors_of(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that keep their row out of training."""
    return [finding for finding in findings if finding.severity == "error"]


_SAID_ONCE = frozenset({"UnknownField", "ImageOrientation", "ImageTransparent", "ImageScaled", "ReservedToken"})
"""Reasons of warnings that tend to hold for every row of a file."""


Counted = tuple[Finding, int]
"""A finding, and how many rows of the file it stands for."""


def count_repeated(findings: Iterable[Counted]) -> list[Counted]:
    """The findings, with equal warnings of a file merged into one that has the sum of their counts.

    Takes findings of single rows, or what this function gave for the parts of a file, in their order.
    """
    kept: list[Finding] = []
    seen: dict[tuple[str, str | None, str | None], int] = {}
    counts: Counter[int] = Counter()
    for finding, count in findings:
        folds = finding.severity == "warning" and finding.reason in _SAID_ONCE
        field = None if finding.reason.startswith("Image") else finding.field
        place = seen.setdefault((finding.reason, field, finding.file), len(kept)) if folds else len(kept)
        if place == len(kept):
            kept.append(finding)
        counts[place] += count
    return [(finding, counts[place]) for place, finding in enumerate(kept)]


def with_counts(findings: Iterable[Counted]) -> list[Finding]:
    """The findings; the message of one that stands for several rows says for how many."""
    return [
        replace(finding, message=f"{finding.message} ({count} times in this file)") if count > 1 else finding
        for finding, count in findings
    ]


def findings_table(findings: Iterable[Finding]) -> Table:
    """A table for a terminal with one line for each finding."""
    table = Table("severity", "file", "line", "field", "reason", "message")
    for finding in findings:
        cells = finding.severity, finding.file, finding.line, finding.field, finding.reason, finding.message
        table.add_row(
            *(Text("" if cell is None else printable(str(cell))) for cell in cells),
            style="red" if finding.severity == "error" else "",
        )
    return table

"""Figures of a dataset: lengths, tiles, repeated rows and answers that say nothing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .diagnostics import Finding
from .row_schema import ChatRow
from .sample import Sample
from .tokenize import IGNORED

_BARS = 12


@dataclass
class DatasetStatistics:
    """Figures of the rows that were added.

    Attributes:
        findings: of all rows, with their lines.
        broken: rows that cannot be used.
    """

    taken_for: str
    lengths: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    broken: int = 0
    empty_answers: list[int] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    _seen: set[bytes] = field(default_factory=set)

    def add(self, row: ChatRow, sample: Sample) -> None:
        """Count a row that can be used."""
        line = row.line or 0
        self.lengths.append(sample.length)
        self.supervised.append(int((sample.labels != IGNORED).sum()))
        self.tiles.append(int(sample.image_flags.sum()))
        self.findings += [finding.at(row.file, row.line) for finding in sample.findings]
        if any(turn.role == "gpt" and is_near_empty(turn.text) for turn in row.turns):
            self.empty_answers.append(line)
        digest = _digest(row)
        if digest in self._seen:
            self.repeated.append(line)
        self._seen.add(digest)

    def add_broken(self, findings: Sequence[Finding]) -> None:
        """Count a row that cannot be used."""
        self.broken += 1
        self.findings += findings

    def facts(self) -> list[tuple[str, str, str]]:
        """(name, value, note) of each figure."""
        return [
            ("Rows", f"{len(self.lengths) + self.broken:,}", f"{self.broken:,} cannot be used"),
            ("Tokens of a row", *_spread(self.lengths)),
            ("Supervised tokens", *_spread(self.supervised)),
            ("Tiles of a row", *_spread(self.tiles)),
            ("Repeated rows", f"{len(self.repeated):,}", _places(self.repeated)),
            ("Near-empty answers", f"{len(self.empty_answers):,}", _places(self.empty_answers)),
        ]


def is_near_empty(answer: str) -> bool:
    """Whether an answer has no letter and no digit."""
    return not any(character.isalnum() for character in answer)


def histogram(values: Sequence[int]) -> list[tuple[str, int, float]]:
    """(range, count, percent of the largest count) of up to 12 ranges of equal width."""
    if not values:
        return []
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // _BARS))
    counts = Counter((value - low) // width for value in values)
    most = max(counts.values())
    return [
        (_range(low + bar * width, width), counts[bar], round(100 * counts[bar] / most, 1))
        for bar in range((high - low) // width + 1)
    ]


def _range(first: int, width: int) -> str:
    return f"{first:,}" if width == 1 else f"{first:,}–{first + width - 1:,}"


def _spread(values: Sequence[int]) -> tuple[str, str]:
    if not values:
        return "–", ""
    middle, high = np.percentile(values, [50, 95]).tolist()
    return f"{middle:,.0f}", f"median; 95% up to {high:,.0f}, most {max(values):,}"


def _places(lines: Sequence[int]) -> str:
    if not lines:
        return ""
    return f"lines {', '.join(str(line) for line in lines[:5])}" + (" …" if len(lines) > 5 else "")


def _digest(row: ChatRow) -> bytes:
    text = repr((row.turns, [(each.path, each.field) for each in row.media.files], row.media.clip))
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()

"""Results of the parts: one JSON file each, and a table of all in a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures: written by `make bench-gpu` -->", "<!-- end of the figures -->"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "deepspeed")}


@dataclass(frozen=True)
class Result:
    """What a part measured on a card, or why it could not."""

    part: str
    card: str
    seconds: float
    figures: dict[str, float | str]
    failure: str = ""
    versions: dict[str, str] = field(default_factory=_versions)

    @classmethod
    def read(cls, path: Path) -> Result | None:
        """The stored result; None where there is none."""
        if not path.exists():
            return None
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(**stored)

    def write(self, path: Path) -> None:
        """Store it; a call that is killed leaves no half of a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def write_page(page: Path, folder: Path, titles: Mapping[str, str]) -> None:
    """Put the tables of all results between the page's two marks, in the order of `titles`."""
    results = [result for name in titles if (result := Result.read(folder / f"{name}.json"))]
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = "\n".join(_table(result, titles[result.part]) for result in results)
    page.write_text(f"{before}{BEGIN}\n\n{_about(results)}\n{tables}\n{END}{after}", encoding="utf-8")


def _about(results: list[Result]) -> str:
    cards = sorted({result.card for result in results})
    versions = sorted({f"{name} {number}" for result in results for name, number in result.versions.items()})
    return f"Measured on {', '.join(cards)} with {', '.join(versions)}.\n"


def _table(result: Result, title: str) -> str:
    if result.failure:
        return f"### {title}\n\nNot measured: {result.failure}\n"
    rows = "\n".join(f"| {name} | {_number(value)} |" for name, value in result.figures.items())
    return f"### {title}\n\n| figure | value |\n| --- | --- |\n{rows}\n"


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"

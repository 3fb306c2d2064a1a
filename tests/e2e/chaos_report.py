"""The result table of a chaos session."""

from __future__ import annotations

import os
from collections import Counter

from e2e.chaos import Chaos
from e2e.chaos_verdict import Product
from rich.console import Console
from rich.table import Table

WIDTH = 150
COLUMNS = ("run", "disturbed by", "at", "attempts", "why they ended", "user", "infra", "max |Δ loss|", "minutes")


def show(chaos: Chaos, products: dict[str, Product], undisturbed: Product, seed: int, seconds: float) -> None:
    """Print a row for each run."""
    table = Table(
        *COLUMNS, title=f"seed {seed}: {len(chaos.told)} runs, {os.cpu_count()} processors, {seconds / 60:.1f} min"
    )
    for name, told in sorted(chaos.told.items()):
        planned, ending = told.planned, chaos.ending(name)
        missed = "" if told.landed else " (missed)"
        distance = products[name].distance(undisturbed) if name in products else None
        table.add_row(
            name,
            planned.kind.title + missed if planned else "-",
            planned.moment if planned else "-",
            str(told.status.attempt),
            ", ".join(f"{reason} x{times}" for reason, times in Counter(ending.reasons).items()) or "-",
            str(told.status.restarts.user),
            str(told.status.restarts.infrastructure),
            "-" if distance is None else f"{distance:.0e}" if distance else "0",
            f"{(told.ended - told.began) / 60:.1f}",
        )
    Console(width=WIDTH).print(table)

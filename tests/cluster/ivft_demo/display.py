"""Display of the demo: a live line for the run, and a table with the duration of each phase."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internvl_api.status import InternVLFineTuneStatus
from ivft_cluster.shell import console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


class RunDisplay:
    """Call it with each new status. It redraws one line on a terminal, and elsewhere (CI) prints a line per change."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[stage]:<10}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("run", total=None, stage="", told="")
        self._last: tuple[object, ...] = ()

    def __enter__(self) -> RunDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, status: InternVLFineTuneStatus) -> None:
        told = describe(status)
        if console.is_terminal:
            progress = status.progress
            self._progress.update(
                self._task,
                stage=status.stage or "",
                told=told,
                total=progress.total_steps if progress else None,
                completed=(progress.step or 0) if progress else 0,
            )
        elif (news := _news(status)) != self._last:
            self._last = news
            console.print(f"  {status.stage or '':<10} {told}")


def describe(status: InternVLFineTuneStatus) -> str:
    """Progress as text: `step 20/60  loss 4.605  3120 tokens/s  12 s left`."""
    progress = status.progress
    if progress is None or progress.stage != status.stage:  # it belongs to the earlier stage
        return f"{status.phase or 'Pending'}: waiting"
    if status.stage != "train" or not progress.step:
        return f"{status.phase}: {progress.detail}"
    parts = [f"step {progress.step}/{progress.total_steps}"]
    parts += [f"loss {progress.loss:.3f}"] if progress.loss is not None else []
    parts += [f"{progress.tokens_per_second:.0f} tokens/s"] if progress.tokens_per_second else []
    parts += [f"{progress.eta_seconds:.0f} s left"] if progress.eta_seconds else []
    return "  ".join(parts)


def _news(status: InternVLFineTuneStatus) -> tuple[object, ...]:
    """Key that changes when a log line is useful: another stage, phase or activity, or ten more steps."""
    progress = status.progress
    return status.stage, status.phase, *((progress.detail, (progress.step or 0) // 10) if progress else ())


class Timetable:
    """Seconds of each phase, now and in the first demo on this machine (which had to build everything)."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._now: dict[str, float] = {}

    @contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """Announce a phase, then time it."""
        console.rule(f"[bold]{title}", align="left")
        start = time.monotonic()
        yield
        self.add(title, time.monotonic() - start)

    def add(self, title: str, seconds: float) -> None:
        self._now[title] = seconds

    def show(self) -> None:
        """Print the table, and store the times of the first complete demo."""
        first = self._first()
        table = Table("phase", "first run here", "this run", title="seconds")
        for column in table.columns[1:]:
            column.justify = "right"
        for title in dict.fromkeys([*first, *self._now]):
            table.add_row(title, _seconds(first.get(title)), _seconds(self._now.get(title)))
        table.add_section()
        table.add_row("total", _seconds(sum(first.values())), _seconds(sum(self._now.values())))
        console.print(table)

    def _first(self) -> dict[str, float]:
        if not self._memory.exists():
            self._memory.write_text(json.dumps(self._now))
        remembered: dict[str, float] = json.loads(self._memory.read_text())
        return remembered


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def show_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print rows as a table."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)

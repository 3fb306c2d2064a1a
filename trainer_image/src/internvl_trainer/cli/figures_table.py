"""The figures before and after training, as a table on the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from internvl_api.status import EvaluationStatus, StageResult
from rich import box
from rich.table import Table
from rich.text import Text

from internvl_trainer.terminal import printable

_MOST_ROWS = 40  # of a run with many tasks; evaluation.json has all


def figures_of_results(results: Iterable[StageResult]) -> EvaluationStatus:
    """The figures that the stages of a run measured, the later over the earlier."""
    found = EvaluationStatus()
    for result in results:
        if result.evaluation is not None:
            found.baseline.update(result.evaluation.baseline)
            found.final.update(result.evaluation.final)
    return found


def figures_table(figures: EvaluationStatus, *, alone: bool = False) -> Table | None:
    """A row for each metric of each task: base model, trained model and their difference; None without figures.

    Args:
        alone: of a run that only evaluates, which has one figure a row.
    """
    tasks = list(dict.fromkeys([*figures.baseline, *figures.final]))
    if not tasks:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="ellipsis", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for name in ("value",) if alone else ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = [row for task in tasks for row in _rows(figures, task)]
    if alone:
        rows = [(task, metric, after) for task, metric, _, after, _ in rows]
    for row in rows[:_MOST_ROWS]:
        table.add_row(*map(Text, row))
    if len(rows) > _MOST_ROWS:
        table.caption = f"{len(rows) - _MOST_ROWS} more are in evaluation.json"
    return table


def _rows(figures: EvaluationStatus, task: str) -> list[tuple[str, ...]]:
    before, after = figures.baseline.get(task, {}), figures.final.get(task, {})
    rows: list[tuple[str, ...]] = []
    for index, metric in enumerate(dict.fromkeys([*before, *after])):
        old, new = before.get(metric), after.get(metric)
        change = "" if old is None or new is None else f"{new - old:+.4f}"
        name = "" if index else printable(task)
        rows.append((name, printable(metric), _number(old), _number(new), change))
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"

"""One page that compares finished runs: settings that differ, curves of loss, scores, time and GPU-hours."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from string import ascii_uppercase

from internvl_api.quantity import gib

from internvl_trainer.artifacts.output_layout import REPORT_PAGE
from internvl_trainer.report.comparison import Comparison
from internvl_trainer.report.page import page_environment
from internvl_trainer.report.plots import DARK, LIGHT, Theme, column, panels, plot_line
from internvl_trainer.report.run_outputs import RunResults
from internvl_trainer.report.samples import data_uri
from internvl_trainer.report.words import duration, moment

MOST_RUNS = 8
"""As many as there are colours."""

_DASH = "–"
_PLOT = "loss.png"
_COLOURS = {
    LIGHT: ("#0b6bb8", "#c8500a", "#00795c", "#a3487e", "#7a6a00", "#3aa0d8", "#5b3fa0", "#555c66"),
    DARK: ("#5cb3f2", "#f2a03d", "#3ccf9f", "#e08fbd", "#e6d84f", "#a8d8f5", "#b79cf2", "#b8bfc9"),
}


@dataclass(frozen=True)
class ScoreRow:
    """A figure of a task in each run; None where the run lacks it."""

    metric: str
    cells: list[Comparison | None]


def write_comparison(runs: Sequence[RunResults], target: Path) -> list[Path]:
    """Write the page, and the plot that is also in it, into `target`; what was written."""
    target.mkdir(parents=True, exist_ok=True)
    plot, page = target / _PLOT, target / REPORT_PAGE
    figure = None
    if any(run.steps for run in runs):
        draw_compared_losses(runs, plot, LIGHT)
        with tempfile.TemporaryDirectory(prefix="figures-") as scratch:
            dark = Path(scratch, _PLOT)
            draw_compared_losses(runs, dark, DARK)
            figure = {
                "light": data_uri(plot.read_bytes(), "image/png"),
                "dark": data_uri(dark.read_bytes(), "image/png"),
            }
    page.write_text(render_comparison(runs, figure), encoding="utf-8", errors="replace")
    return [page, plot] if figure else [page]


def render_comparison(runs: Sequence[RunResults], figure: dict[str, str] | None) -> str:
    """The page; `figure` has the data URIs of the plot on a light and on a dark page."""
    return page_environment().get_template("compare.html.j2").render(
        letters=ascii_uppercase[: len(runs)],
        runs=runs,
        figure=figure,
        summary=summary(runs),
        differing=differing(runs),
        scores=scores(runs),
        version=version("internvl-trainer"),
    )  # fmt: skip


def summary(runs: Sequence[RunResults]) -> list[tuple[str, list[str]]]:
    """(what, value of each run); a dash where a run lacks it."""

    def text(value: float | None, form: str) -> str:
        return _DASH if value is None else format(value, form)

    def last_loss(run: RunResults) -> float | None:
        return run.steps[-1]["loss"] if run.steps else None

    return [
        ("Published (UTC)", [moment(run.published) if run.published else _DASH for run in runs]),
        ("Hardware", [_hardware(run) for run in runs]),
        ("Steps", [f"{run.steps[-1]['step']:,}" if run.steps else _DASH for run in runs]),
        ("Time in steps", [_DASH if run.seconds is None else duration(run.seconds) for run in runs]),
        ("GPU-hours in steps", [text(run.gpu_hours, ",.2f") for run in runs]),
        ("Tokens a second", [text(run.throughput, ",.0f") for run in runs]),
        ("Peak GPU memory", [gib(run.peak_gpu_bytes) if run.peak_gpu_bytes else _DASH for run in runs]),
        ("Training loss, last", [text(last_loss(run), ".4f") for run in runs]),
        ("Validation loss, lowest", [text(min((loss for _, loss in run.validation()), default=None), ".4f")
                                     for run in runs]),
    ]  # fmt: skip


def differing(runs: Sequence[RunResults]) -> list[tuple[str, list[str]]]:
    """(path, value in each run) of the settings that are not the same in all runs."""
    paths = dict.fromkeys(path for run in runs for path in run.settings)
    rows = [(path, [run.settings.get(path, _DASH) for run in runs]) for path in paths]
    return [(path, values) for path, values in rows if len(set(values)) > 1]


def scores(runs: Sequence[RunResults]) -> dict[str, list[ScoreRow]]:
    """Task to its figures, in the order of the first run that has them."""
    found: dict[str, dict[str, list[Comparison | None]]] = {}
    for place, run in enumerate(runs):
        for task, compared in run.compared.items():
            for each in compared:
                cells = found.setdefault(task, {}).setdefault(each.metric, [None] * len(runs))
                cells[place] = each
    return {task: [ScoreRow(metric, cells) for metric, cells in rows.items()] for task, rows in found.items()}


def draw_compared_losses(runs: Sequence[RunResults], path: Path, theme: Theme) -> None:
    """The training loss of each run as a line, and its validation loss as dots."""
    with panels(path, theme) as (axes,):
        for run, letter, colour in zip(runs, ascii_uppercase, _COLOURS[theme], strict=False):
            if not run.steps:
                continue
            plot_line(axes, run.steps, column(run.steps, "loss"), colour, letter)
            if held_out := run.validation():
                at, losses = zip(*held_out, strict=True)
                axes.plot(at, losses, ":o", color=colour, markersize=4, label=f"{letter}, validation")
        axes.legend(frameon=False, labelcolor=theme.text)
        axes.set(title="Loss of a supervised token", xlabel="optimizer step")


def _hardware(run: RunResults) -> str:
    if run.device is None:
        return _DASH
    return f"{run.steps[-1]['world_size']} × {run.device}" if run.steps else run.device

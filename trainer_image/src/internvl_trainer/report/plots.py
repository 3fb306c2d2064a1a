"""The plots of the report, drawn by matplotlib for a light and for a dark page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from internvl_api.publish_condition import METRICS

from internvl_trainer.report.record import Record, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES, _DPI = (5.6, 3.4), 180  # 1008 x 612 pixels: sharp in half a desktop's width, readable on a phone
_SMOOTHED_FROM = 60  # steps; a shorter curve is readable as it is
_MARKED_UP_TO = 2  # steps: a line through one point cannot be seen
_DRAWN_TASKS = 8  # further tasks are only in the table


@dataclass(frozen=True)
class Theme:
    """Colours that can be told apart by the colour-blind (after Okabe and Ito), on their background."""

    background: str
    text: str
    grid: str
    first: str
    second: str


LIGHT = Theme("#ffffff", "#1f2430", "#d5d9e0", "#0b6bb8", "#c8500a")
DARK = Theme("#171b23", "#dfe3ea", "#39404d", "#5cb3f2", "#f2a03d")


def draw_plots(record: Record, folder: Path, theme: Theme = LIGHT) -> list[Path]:
    """Write a PNG for each plot that has data into `folder`, which exists; their paths, in the order of the page."""
    figures: dict[str, tuple[bool, Callable[[Record, Path, Theme], None]]] = {
        "metrics.png": (bool(record.final or record.baseline), draw_metrics),
        "loss.png": (bool(record.steps), draw_losses),
        "learning-rate.png": (bool(record.steps), draw_learning_rate),
        "throughput.png": (bool(record.steps), draw_throughput),
    }
    drawn = []
    for name, (is_known, draw) in figures.items():
        if is_known:
            draw(record, folder / name, theme)
            drawn.append(folder / name)
    return drawn


def draw_losses(record: Record, path: Path, theme: Theme) -> None:
    """The loss of every step, and the validation loss where it was taken."""
    with _panels(path, theme) as (axes,):
        losses = _column(record.steps, "loss")
        _plot(axes, record.steps, losses, theme.first, "training")
        if held_out := record.validation():
            axes.plot(*zip(*held_out, strict=True), color=theme.second, marker="o", markersize=4, label="validation")
            axes.legend(frameon=False, labelcolor=theme.text)
        axes.set(title="Loss of a supervised token", xlabel="optimizer step")


def draw_learning_rate(record: Record, path: Path, theme: Theme) -> None:
    """The learning rate, and the norm of the gradients below it."""
    with _panels(path, theme, rows=2) as (above, below):
        _plot(above, record.steps, _column(record.steps, "learning_rate"), theme.first, smooth=False)
        above.set(title="Learning rate")
        above.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        _plot(below, record.steps, _column(record.steps, "gradient_norm"), theme.second)
        below.set(title="Norm of the gradients, before clipping", xlabel="optimizer step")


def draw_throughput(record: Record, path: Path, theme: Theme) -> None:
    """Tokens a second, and the part of each step that waited for data below it."""
    steps = record.steps
    seconds = _column(steps, "step_seconds")
    with _panels(path, theme, rows=2) as (above, below):
        _plot(above, steps, _column(steps, "tokens") / seconds, theme.first)
        above.set(title="Tokens a second, over all processes", ylim=(0, None))
        _plot(below, steps, 100 * _column(steps, "data_wait_seconds") / seconds, theme.second)
        below.set(title="Time spent waiting for data, % of a step", xlabel="optimizer step", ylim=(0, None))


def draw_metrics(record: Record, path: Path, theme: Theme) -> None:
    """Every figure of every task before and after, as two dots on a line."""
    rows = metric_rows(record.baseline, record.final)[:_DRAWN_TASKS]
    count = sum(len(metrics) + 1 for _, metrics in rows)
    with _panels(path, theme, inches=(_INCHES[0], 1.0 + 0.3 * count)) as (axes,):
        labels, place = [], 0
        for task, metrics in rows:
            labels.append(task)
            for name, before, after in metrics:
                place += 1
                labels.append(name)
                known = [value for value in (before, after) if value is not None]
                axes.plot(known, [place] * len(known), color=theme.grid, linewidth=3, zorder=1)
                for value, color in ((before, theme.second), (after, theme.first)):
                    if value is not None:
                        axes.scatter([value], [place], s=46, color=color, zorder=2)
            place += 1
        _label_rows(axes, labels, {task for task, _ in rows})
        _name_dots(axes, theme, bool(record.baseline), bool(record.final))
        axes.set(title="Evaluation")
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))


MetricRows = list[tuple[str, list[tuple[str, float | None, float | None]]]]


def metric_rows(baseline: Mapping[str, Mapping[str, float]], final: Mapping[str, Mapping[str, float]]) -> MetricRows:
    """(task, [(metric, before, after)]) of every known figure, metrics in their usual order."""

    def of_task(task: str) -> list[tuple[str, float | None, float | None]]:
        before, after = baseline.get(task, {}), final.get(task, {})
        names = sorted({*before, *after}, key=lambda name: (METRICS.index(name) if name in METRICS else 99, name))
        return [(name, before.get(name), after.get(name)) for name in names]

    return [(task, of_task(task)) for task in dict.fromkeys([*final, *baseline])]


def _label_rows(axes: Axes, labels: Sequence[str], headings: set[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    for tick in axes.get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() in headings else "normal")
    axes.tick_params(axis="y", length=0)


def _name_dots(axes: Axes, theme: Theme, has_before: bool, has_after: bool) -> None:
    for is_there, color, label in ((has_before, theme.second, "before"), (has_after, theme.first, "after")):
        if is_there:
            axes.scatter([], [], s=46, color=color, label=label)
    axes.legend(frameon=False, labelcolor=theme.text, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def _column(steps: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in steps], dtype=float)


def _plot(
    axes: Axes, steps: Sequence[Row], values: np.ndarray, color: str, label: str | None = None, *, smooth: bool = True
) -> None:
    """Draw a line; a long one smoothed, with the measured values pale behind it."""
    numbers = _column(steps, "step")
    smooth = smooth and len(values) >= _SMOOTHED_FROM
    marker = "o" if len(values) <= _MARKED_UP_TO else None
    axes.plot(numbers, values, color=color, linewidth=1.4, alpha=0.3 if smooth else 1, marker=marker,
              label=None if smooth else label)  # fmt: skip
    if smooth:
        axes.plot(numbers, smoothed(values, len(values) // 50), color=color, linewidth=1.6, label=label)


def smoothed(values: np.ndarray, reach: int) -> np.ndarray:
    """(n,) means over `reach` values to either side; fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    means: np.ndarray = (sums[last] - sums[first]) / (last - first)
    return means


@contextmanager
def _panels(
    path: Path, theme: Theme, *, rows: int = 1, inches: tuple[float, float] = _INCHES
) -> Iterator[Sequence[Axes]]:
    """Empty panels, one above the other; saved as a PNG at the end."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: Any = {
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), theme.text),
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
    }
    with rc_context(style):
        figure = Figure(figsize=inches, dpi=_DPI, layout="constrained")  # no pyplot: nothing is shared or left open
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        if path.name != "metrics.png":
            axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        yield list(axes)
        figure.savefig(path)

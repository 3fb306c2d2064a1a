"""The plots of the report, drawn by matplotlib for a light and for a dark page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from internvl_api.publish_condition import ANSWER_METRICS, METRICS

from internvl_trainer.report.record import Record, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES, _DPI = (5.6, 3.4), 180  # 1008 x 612 pixels: sharp in half a desktop's width, readable on a phone
_SMOOTHED_FROM = 60  # steps; a shorter curve is readable as it is
_MARKED_UP_TO = 2  # steps: a line through one point cannot be seen
_DRAWN_TASKS = 8  # further tasks are only in the table
_BEYOND_ONE = ("CIDEr",)  # figures that have an axis of their own
_LITTLE_WAITING = 10.0  # %: the axis of waiting shows at least that much, so that a little looks like it


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
    with panels(path, theme) as (axes,):
        losses = column(record.steps, "loss")
        plot_line(axes, record.steps, losses, theme.first, "training")
        if held_out := record.validation():
            axes.plot(*zip(*held_out, strict=True), color=theme.second, marker="o", markersize=4, label="validation")
            losses_at = dict(held_out)
            if (exported := record.exported_step) in losses_at:
                axes.scatter([exported], [losses_at[exported]], s=90, facecolors="none", edgecolors=theme.text,
                             linewidths=1.4, zorder=3, label=f"exported: step {exported}")  # fmt: skip
            axes.legend(frameon=False, labelcolor=theme.text)
        axes.set(title="Loss of a supervised token", xlabel="optimizer step")


def draw_learning_rate(record: Record, path: Path, theme: Theme) -> None:
    """The learning rate, and the norm of the gradients below it."""
    with panels(path, theme, rows=2) as (above, below):
        plot_line(above, record.steps, column(record.steps, "learning_rate"), theme.first, smooth=False)
        above.set(title="Learning rate")
        above.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        plot_line(below, record.steps, column(record.steps, "gradient_norm"), theme.second)
        below.set(title="Norm of the gradients, before clipping", xlabel="optimizer step")


def draw_throughput(record: Record, path: Path, theme: Theme) -> None:
    """Tokens a second, and the part of each step that waited for data below it."""
    steps = record.steps
    seconds = column(steps, "step_seconds")
    with panels(path, theme, rows=2) as (above, below):
        plot_line(above, steps, column(steps, "tokens") / seconds, theme.first)
        above.set(title="Tokens a second, over all processes", ylim=(0, None))
        waits = 100 * column(steps, "data_wait_seconds") / seconds
        plot_line(below, steps, waits, theme.second)
        most = max(_LITTLE_WAITING, 1.08 * float(waits.max()))
        below.set(title="Time spent waiting for data, % of a step", xlabel="optimizer step", ylim=(0, most))


def draw_metrics(record: Record, path: Path, theme: Theme) -> None:
    """Every figure of every task before and after, as two dots on a line; one dot where nothing is trained."""
    measured = metric_rows(record.baseline, record.final)
    rows = [(task, [each for each in metrics if each[0] not in ANSWER_METRICS]) for task, metrics in measured]
    groups = _by_scale(rows[:_DRAWN_TASKS])
    counts = [sum(len(metrics) + 1 for _, metrics in group) for _, group in groups]
    height = 0.4 + 0.6 * len(groups) + 0.3 * sum(counts)
    with panels(path, theme, inches=(_INCHES[0], height), heights=counts) as drawn:
        for axes, (title, group) in zip(drawn, groups, strict=True):
            _draw_dots(axes, group, theme)
            axes.set(title=title)
        if not record.alone:
            _name_dots(drawn[0], theme, bool(record.baseline), bool(record.final))


MetricRows = list[tuple[str, list[tuple[str, float | None, float | None]]]]


def _by_scale(rows: MetricRows) -> list[tuple[str, MetricRows]]:
    """(title, rows) of the panels that have figures: those up to 1, and those beyond."""

    def having(is_beyond: bool) -> MetricRows:
        found = [(task, [each for each in metrics if (each[0] in _BEYOND_ONE) == is_beyond]) for task, metrics in rows]
        return [(task, metrics) for task, metrics in found if metrics]

    found_in = [("Evaluation", having(False)), (f"Evaluation: {', '.join(_BEYOND_ONE)}, up to 10", having(True))]
    return [(title, found) for title, found in found_in if found] or [("Evaluation", rows)]


def _draw_dots(axes: Axes, rows: MetricRows, theme: Theme) -> None:
    labels, place, every = [], 0, [0.0]
    for task, metrics in rows:
        labels.append(task)
        for name, before, after in metrics:
            place += 1
            labels.append(name)
            known = [value for value in (before, after) if value is not None]
            every += known
            axes.plot(known, [place] * len(known), color=theme.grid, linewidth=3, zorder=1)
            for value, color in ((before, theme.second), (after, theme.first)):
                if value is not None:
                    axes.scatter([value], [place], s=46, color=color, zorder=2)
        place += 1
    _label_rows(axes, labels, {task for task, _ in rows})
    top = max(every)
    axes.set_xlim(1.08 * min(every) - 0.02 * (top or 1), 1.08 * top or 1.0)


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


def column(steps: Sequence[Row], name: str) -> np.ndarray:
    """A column of metrics.jsonl."""
    return np.array([row[name] for row in steps], dtype=float)


def plot_line(
    axes: Axes, steps: Sequence[Row], values: np.ndarray, color: str, label: str | None = None, *, smooth: bool = True
) -> None:
    """Draw a line; a long one smoothed, with the measured values pale behind it."""
    numbers = column(steps, "step")
    smooth = smooth and len(values) >= _SMOOTHED_FROM
    marker = "o" if len(values) <= _MARKED_UP_TO else None
    axes.plot(numbers, values, color=color, linewidth=1.4, alpha=0.3 if smooth else 1, marker=marker,
              label=None if smooth else label)  # fmt: skip
    if not values.any():
        axes.set_ylim(0, 1)  # around a line of zeros the axis would reach below zero
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
def panels(
    path: Path,
    theme: Theme,
    *,
    rows: int = 1,
    inches: tuple[float, float] = _INCHES,
    heights: Sequence[float] | None = None,
) -> Iterator[Sequence[Axes]]:
    """Empty panels, one above the other; saved as a PNG at the end.

    Args:
        heights: of panels that share no axis, relative to each other; without it, `rows` panels over the steps.
    """
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
        if heights is None:
            axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
            axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        yield list(axes)
        figure.savefig(path)

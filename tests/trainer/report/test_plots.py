"""The axes of the plots."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from internvl_api.recipes.summary import recipe_config
from internvl_trainer.report import plots
from internvl_trainer.report.plots import LIGHT, draw_losses, draw_metrics, draw_throughput
from internvl_trainer.report.record import Record
from matplotlib.figure import Figure

CONFIG = recipe_config("internvl2-26b-full")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they are saved; nothing is written."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: found.append(self))
    return found


def step(number: int, **changes: Any) -> dict[str, Any]:
    return {"step": number, "loss": 1.0, "tokens": 10, "step_seconds": 1.0, "data_wait_seconds": 0.0, **changes}


def test_cider_has_an_axis_of_its_own(drawn: list[Figure], tmp_path: Path) -> None:
    final = {"coco": {"CIDEr": 8.0, "BLEU_4": 0.25}, "boxes": {"box_accuracy": 0.5}}
    draw_metrics(Record(config=CONFIG, final=final), tmp_path / "metrics.png", LIGHT)
    above, below = drawn[0].axes
    assert [tick.get_text() for tick in above.get_yticklabels()] == ["coco", "BLEU_4", "boxes", "box_accuracy"]
    assert [tick.get_text() for tick in below.get_yticklabels()] == ["coco", "CIDEr"]
    assert above.get_xlim()[1] < 1 < 8 < below.get_xlim()[1]


@pytest.mark.parametrize("metric", ["CIDEr", "BLEU_4"])
def test_figures_that_are_all_zero_have_a_whole_axis(metric: str, drawn: list[Figure], tmp_path: Path) -> None:
    record = Record(config=CONFIG, final={"coco": {metric: 0.0}}, baseline={"coco": {metric: 0.0}})
    draw_metrics(record, tmp_path / "metrics.png", LIGHT)
    (axes,) = drawn[0].axes
    assert axes.get_xlim() == pytest.approx((-0.02, 1.0))


def test_curves_that_are_all_zero_start_at_zero(drawn: list[Figure], tmp_path: Path) -> None:
    record = Record(config=CONFIG, steps=[step(number, loss=0.0, tokens=0) for number in range(1, 9)])
    draw_losses(record, tmp_path / "loss.png", LIGHT)
    draw_throughput(record, tmp_path / "throughput.png", LIGHT)
    (losses,), (tokens, waiting) = drawn[0].axes, drawn[1].axes
    assert losses.get_ylim() == tokens.get_ylim() == (0, 1)
    assert waiting.get_ylim() == (0, 10)


def test_much_waiting_is_on_the_axis(drawn: list[Figure], tmp_path: Path) -> None:
    record = Record(config=CONFIG, steps=[step(number, data_wait_seconds=number / 10) for number in range(1, 9)])
    draw_throughput(record, tmp_path / "throughput.png", LIGHT)
    assert drawn[0].axes[1].get_ylim()[1] > 80


def test_a_figure_without_scores_can_be_drawn(drawn: list[Figure], tmp_path: Path) -> None:
    draw_metrics(Record(config=CONFIG, final={"coco": {"repetition": 0.5}}), tmp_path / "metrics.png", LIGHT)
    assert len(drawn[0].axes) == 1


def test_a_column_has_the_numbers_of_each_row() -> None:
    assert np.array_equal(plots.column([step(1), step(2, loss=3)], "loss"), [1.0, 3.0])

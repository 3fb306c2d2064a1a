"""Detect a loss that rises and stays high, from the recorded steps alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

_WINDOW = 10  # steps of a mean
_SHORTEST_WINDOW = 3  # of a short run
_FACTOR = 10.0
_JUMP = 5.0  # of a loss that begins too high to rise tenfold: a model that guesses has about 12
_LEAST_FIRST = 0.5  # lower bound of the first step's loss: one batch may be easy by chance
_SMALLEST = 1.0  # lower means never count as risen: they are noise of a loss near 0


class LossRise(NamedTuple):
    """The first rise of the loss.

    Attributes:
        step: the last step of the risen mean.
        low_step: the last step of the lowest mean before.
        low, high: the two means, each over `window` steps.
        peak_rate: the highest learning rate up to `step`.
    """

    step: int
    low_step: int
    low: float
    high: float
    peak_rate: float
    window: int

    def __str__(self) -> str:
        return (
            f"LossRises: the mean loss of {self.window} steps rose from {self.low:.4g} (up to step {self.low_step}) to "
            f"{self.high:.4g} (up to step {self.step}) with learning rates up to {self.peak_rate:.3g}; lower "
            "training.learningRate, raise training.warmupRatio, or look at the rows of those steps"
        )


class LossWatch:
    """Watches the loss of each step. The rule is deterministic: equal steps give an equal finding, in any attempt.

    The loss has risen when the mean of the last ten steps (fewer in a run of less than 20) is more than ten times the
    lowest such mean before, or more than 5 above it; the first step counts as such a mean. The finding stays when the
    loss falls again.
    """

    def __init__(self, total_steps: int) -> None:
        self._window = max(_SHORTEST_WINDOW, min(_WINDOW, total_steps // 2))
        self._losses: deque[float] = deque(maxlen=self._window)
        self._low: tuple[float, int] | None = None
        self._first_step = 0
        self._peak_rate = 0.0
        self.found: LossRise | None = None

    def add(self, row: Mapping[str, Any]) -> bool:
        """Add one step, as in metrics.jsonl; returns whether this step reveals a rise."""
        self._losses.append(row["loss"])
        self._peak_rate = max(self._peak_rate, row["learning_rate"])
        if self._low is None:  # the untouched model's: a rate that is too high ruins it before the first mean
            self._low = row["loss"], row["step"]
            self._first_step = row["step"]
        if self.found is not None or len(self._losses) < self._window:
            return False
        mean, step = sum(self._losses) / self._window, row["step"]
        if mean < self._low[0]:
            self._low = mean, step
        low, low_step = self._low
        least = max(low, _LEAST_FIRST) if low_step == self._first_step else low
        if mean > _SMALLEST and (mean > _FACTOR * least or mean > least + _JUMP):
            self.found = LossRise(step, low_step, low, mean, self._peak_rate, self._window)
        return self.found is not None

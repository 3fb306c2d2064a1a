"""The two decisions from losses on held-out rows: the best step so far, and when training ends early.

Both are functions of the losses in the metrics log, which every checkpoint holds. An attempt that resumes gets the same
answers, and so do all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from internvl_api.spec import EarlyStopping


class Best(NamedTuple):
    """A step, and the loss on data.validation after it."""

    step: int
    loss: float


class HeldOut:
    """The losses on data.validation so far.

    Attributes:
        lowest: the step with the lowest loss, the first of several equal ones; None before the first validation.
        ended: why training ends after the last step added although steps are left; None while it goes on.
    """

    def __init__(
        self,
        stopping: EarlyStopping | None = None,
        losses: Iterable[tuple[int, float]] = (),
        *,
        total_steps: int | None = None,
    ) -> None:
        """`losses`: (step, loss) of the steps validated by earlier attempts, in their order."""
        self._stopping, self._total_steps = stopping, total_steps
        self._losses: dict[int, float] = {}
        self._improved: Best | None = None  # the last loss that counts as an improvement
        self._since = 0  # validations after it
        self.lowest: Best | None = None
        self.ended: str | None = None
        for step, loss in losses:
            self.add(step, loss)

    def add(self, step: int, loss: float) -> None:
        """Add the loss after `step` steps."""
        self._losses[step] = loss
        if self.lowest is None or loss < self.lowest.loss:
            self.lowest = Best(step, loss)
        least = self._stopping.min_delta if self._stopping else 0.0
        if self._improved is None or loss < self._improved.loss - least:
            self._improved, self._since = Best(step, loss), 0
            return
        self._since += 1
        if self._stopping and self._since >= self._stopping.patience and step != self._total_steps:
            self.ended = _explain(step, self._improved, self._since, least)

    def loss(self, step: int) -> float | None:
        """The loss after `step` steps; None where it was not taken."""
        return self._losses.get(step)

    def note_of(self, step: int) -> str:
        """The end of the log line about the loss after `step`, the last step added."""
        if self.lowest and self.lowest.step == step:
            return ", the lowest so far"
        lowest = f"; the lowest is {self.lowest.loss:.4f} of step {self.lowest.step}" if self.lowest else ""
        return f"{lowest}; training {self.ended}" if self.ended else lowest

    def ranked(self) -> list[Best]:
        """Every validated step, the lowest loss first; of equal ones the earlier."""
        return sorted((Best(*item) for item in self._losses.items()), key=lambda best: (best.loss, best.step))


class Exported(NamedTuple):
    """The step whose weights are exported.

    Attributes:
        loss: on data.validation after the step; None where it was not taken.
        note: why it is this step; None for the last step of a run without keepBest.
    """

    step: int
    loss: float | None
    note: str | None = None

    @property
    def about(self) -> dict[str, object]:
        """The fields for the manifest of the train stage."""
        known = {"step": self.step, "validationLoss": self.loss, "note": self.note}
        return {name: value for name, value in known.items() if value is not None}


def choose_best(held_out: HeldOut, last: int, use_weights: Callable[[int], bool]) -> Exported:
    """The step with the lowest loss whose weights can be loaded; loads them.

    Args:
        last: the last step, whose weights are loaded already.
        use_weights: loads those of an earlier step; False when its checkpoint is gone or broken.
    """
    missing: list[Best] = []
    for best in held_out.ranked():
        if best.step == last or use_weights(best.step):
            note = f"exports the weights of step {best.step}, whose loss on data.validation is {best.loss:.4f}"
            if not missing:
                return Exported(*best, f"{note}, the lowest")
            return Exported(*best, f"{note}; those of lower losses have no whole checkpoint: step {_listed(missing)}")
        missing.append(best)
    raise AssertionError(f"no loss on data.validation after the last step {last}")


def _listed(bests: list[Best]) -> str:
    return ", ".join(f"{best.step} ({best.loss:.4f})" for best in bests)


def _explain(step: int, improved: Best, since: int, least: float) -> str:
    count = "the last loss" if since == 1 else f"none of the last {since} losses"
    below = f"more than {least:g} below" if least else "below"
    verb = "is not" if since == 1 else "is"
    return (
        f"ended after step {step}: {count} on data.validation {verb} {below} the {improved.loss:.4f} of step "
        f"{improved.step} (training.earlyStopping)"
    )

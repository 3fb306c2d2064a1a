"""The loss of each dataset, taken from the losses of tokens that a step or a validation computes anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from internvl_trainer.data.tokenize import IGNORED


class DatasetLosses:
    """Sums of token losses and numbers of supervised tokens of each dataset, over several batches."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._sums = torch.zeros(len(names), dtype=torch.float64)
        self._tokens = torch.zeros(len(names), dtype=torch.float64)

    def add(self, labels: torch.Tensor, sources: torch.Tensor, losses: torch.Tensor) -> None:
        """Count a batch.

        Args:
            labels: (B, L) unshifted.
            sources: (B, L) number of each position's dataset.
            losses: (supervised positions,) unweighted, in the order of `labels[:, 1:]`.
        """
        own = sources[:, 1:][labels[:, 1:] != IGNORED]
        self._sums.index_add_(0, own, losses.detach().double().cpu())
        self._tokens += torch.bincount(own, minlength=len(self._names))

    def values(self) -> list[float]:
        """Sums, then numbers of tokens: what ranks add up."""
        return [*self._sums.tolist(), *self._tokens.tolist()]

    def means(self, totals: Sequence[float]) -> dict[str, float] | None:
        """Mean loss of a supervised token of each dataset that had one, from the added `values`.

        None for a single dataset, whose loss is the whole.
        """
        count = len(self._names)
        if count < 2:
            return None
        pairs = zip(self._names, totals[:count], totals[count:], strict=True)
        return {name: total / tokens for name, total, tokens in pairs if tokens}

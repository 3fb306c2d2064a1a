"""The losses of a step or a validation batch: kept on the device, and read from it once."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class StepLosses:
    """Sums of losses over several micro-batches: of all, and of each dataset from the losses of tokens."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names`: of the datasets, by their numbers."""
        self._names = list(names)
        self._sums: list[torch.Tensor] = []
        self._tokens: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []

    def add(
        self, loss_sum: torch.Tensor, token_losses: torch.Tensor | None = None, sources: torch.Tensor | None = None
    ) -> None:
        """Keep the losses of a micro-batch, without waiting for them.

        Args:
            loss_sum: scalar.
            token_losses: (supervised positions,) unweighted.
            sources: (supervised positions,) number of each position's dataset, on the host; None for one dataset.
        """
        self._sums.append(loss_sum.detach().float().reshape(1))
        if sources is not None and token_losses is not None:
            self._tokens.append(token_losses.detach().float())
            self._sources.append(sources)

    def read(self) -> tuple[float, list[float]]:
        """The sum of the micro-batches' losses, and sums, then numbers of tokens, of each dataset: what ranks add up.

        The only place before the optimizer's update where this trainer waits for the device; DeepSpeed's own are in
        decision 18.
        """
        values = torch.cat([*self._sums, *self._tokens]).cpu() if self._sums else torch.zeros(0)
        total = sum(values[: len(self._sums)].tolist())
        sums = torch.zeros(len(self._names), dtype=torch.float64)
        counts = torch.zeros(len(self._names), dtype=torch.int64)
        if self._sources:
            sources = torch.cat(self._sources)
            sums.index_add_(0, sources, values[len(self._sums) :].double())
            counts += torch.bincount(sources, minlength=len(self._names))
        return total, [*sums.tolist(), *map(float, counts.tolist())]

    def means(self, totals: Sequence[float]) -> dict[str, float] | None:
        """Mean loss of a supervised token of each dataset that had one, from the added sums and numbers of `read`.

        None for a single dataset, whose loss is the whole.
        """
        count = len(self._names)
        if count < 2:
            return None
        pairs = zip(self._names, totals[:count], totals[count:], strict=True)
        return {name: total / tokens for name, total, tokens in pairs if tokens}

"""Share the check of a dataset's rows among the pods of preflight (data.preflight.workers).

Each pod checks its part of the shards and then those that no pod has stored. The pods exchange nothing but stored
shards, so none waits for another: the first pod checks whatever the others leave.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from internvl_trainer.distributed import Rendezvous
from internvl_trainer.stages.row_shards import Rows, ShardStore, computed, spans_of

_LISTED_SECONDS = 10.0  # between two listings of the stored shards


@dataclass(frozen=True)
class Part:
    """Which part of the shards a pod checks first: of `pods` pods it is number `pod`, from 0."""

    pod: int = 0
    pods: int = 1

    @classmethod
    def of_this_pod(cls) -> Part:
        """The part of this pod, which the operator numbers as it numbers ranks."""
        rendezvous = Rendezvous.from_environment(os.environ)
        return cls(rendezvous.rank, rendezvous.world_size)

    @property
    def leads(self) -> bool:
        """Whether this pod reads all results and reports them."""
        return self.pod == 0

    def order(self, spans: Sequence[range]) -> list[range]:
        """Every span: this pod's part, then the others in an order of its own, so that two pods seldom meet."""
        own = list(spans[self.pod :: self.pods])
        others = [span for number, span in enumerate(spans) if number % self.pods != self.pod]
        random.Random(self.pod).shuffle(others)
        return own + others


def check_part(
    source: Rows,
    chosen: Sequence[int],
    store: ShardStore,
    part: Part,
    *,
    processes: int,
    is_over: Callable[[], bool] = lambda: False,
    tell: Callable[[int], None] = lambda rows: None,
    listed_seconds: float = _LISTED_SECONDS,
) -> None:
    """Check and store this pod's part of the shards, then those that no pod has stored. One shard is not shared.

    Args:
        chosen: numbers of the file's rows, ascending.
        is_over: asked between two shards: whether another pod has finished the stage, so that nothing is left to do.
        tell: gets the number of rows that any pod is known to have checked, after each shard.
        listed_seconds: time between two looks at what the other pods have stored.
    """
    spans = spans_of(len(chosen))
    if len(spans) < 2:
        return
    known = _Known(store, is_over, listed_seconds)
    for shard in computed(source, chosen, known.missing(part.order(spans)), min(processes, len(spans))):
        store.add(shard)
        known.shards.add(shard.first)
        tell(sum(len(span) for span in spans if span.start in known.shards))


class _Known:
    """The shards that some pod has stored, as far as this one knows."""

    def __init__(self, store: ShardStore, is_over: Callable[[], bool], seconds: float) -> None:
        self.shards: set[int] = set()
        self._store, self._is_over, self._seconds = store, is_over, seconds
        self._listed_at: float | None = None

    def missing(self, spans: Sequence[range]) -> Iterator[range]:
        """The spans that no pod has stored, looked up anew as they are taken; none once the stage is finished."""
        for span in spans:
            now = time.monotonic()
            if self._listed_at is None or now - self._listed_at >= self._seconds:
                if self._is_over():
                    return
                self._listed_at = now
                self.shards |= self._store.finished()  # at its end the first pod deletes them: known ones stay known
            if span.start not in self.shards:
                yield span

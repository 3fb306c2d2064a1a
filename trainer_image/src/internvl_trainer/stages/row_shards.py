"""Check the rows of a dataset in shards, in several processes, and go on after a kill with the missing shards.

Checking is Python, so one process uses one core. The result of a shard is small, its folded findings and eight bytes a
row, and is stored as soon as the shard is checked: under the run's output, or where other runs find it too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.data.diagnostics import Counted, Finding, count_repeated
from internvl_trainer.errors import UserError
from internvl_trainer.signals import die_with_parent, only_default_signals

logger = logging.getLogger(__name__)

SHARD_ROWS = 20_000
_VERSION = 2  # of a stored shard; raise it when this format changes
_NAME = re.compile(r"[0-9]{12}\.json")
_LARGEST = 1 << 26  # bytes of a stored shard; one with more findings is checked again
_WAITING = 2  # shards that each process works on or has been given


class Rows(Protocol):
    """The rows of a dataset with their checks."""

    def check(self, rows: Sequence[int], sizes: np.ndarray) -> list[Finding]:
        """Findings of these rows, in their order; fills `sizes`, (rows, 2) int32, with their tokens and tiles."""
        ...

    def reopened(self) -> Rows:
        """The same for a forked process."""
        ...


class Shard(BaseModel):
    """The result of the chosen rows [first, first + rows): folded findings, and tokens and tiles of each row."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    version: int = _VERSION
    key: str = ""  # digest of everything that decides the result; the store sets it
    first: int = Field(ge=0)
    rows: int = Field(ge=1, le=SHARD_ROWS)
    findings: list[tuple[Finding, int]]
    sizes: str = Field(max_length=16 * SHARD_ROWS)  # base64 of (rows, 2) int32, little-endian

    def sizes_array(self) -> np.ndarray:
        """(rows, 2) int32. Raises ValueError for a shard that is cut off."""
        return np.frombuffer(base64.b64decode(self.sizes, validate=True), "<i4").reshape(self.rows, 2)


class ShardStore:
    """Finished shards of one dataset, each with its checksum, in a folder that is named by their key.

    Args:
        key: digest of everything that decides a shard's result; a shard with another one is not used.
        shared: whether other runs read the folder too; then a single shard is stored as well.
    """

    def __init__(self, storage: Storage, folder: str, key: str, *, shared: bool = False) -> None:
        self._storage, self._folder, self._key = storage, f"{folder}/{key}", key
        self.shared = shared
        self.uri = f"{storage.uri}/{self._folder}"

    def load(self) -> dict[int, Shard]:
        """The finished shards, by first row; one that cannot be read is left out, and its rows are checked again."""
        found = {}
        for file in self._storage.list(f"{self._folder}/"):
            try:
                shard = self._parse(self._storage.read(file.key) if file.size <= _LARGEST else b"")
            except UserError as error:
                if error.reason != "NotFound":  # NotFound: another run has made room
                    raise
                continue
            except (ValidationError, ValueError) as error:
                logger.warning("%s is no result of a shard and is not used: %s", file.key, error)
                continue
            found[shard.first] = shard
        return found

    def finished(self) -> set[int]:
        """First rows of the shards that are stored, whole or not; costs one listing."""
        names = (file.key.rpartition("/")[2] for file in self._storage.list(f"{self._folder}/"))
        return {int(name.removesuffix(".json")) for name in names if _NAME.fullmatch(name)}

    def _parse(self, data: bytes) -> Shard:
        """Raises ValueError for anything but a shard of this store that is whole."""
        digest, _, text = data.partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            raise ValueError("its checksum does not match")
        shard = Shard.model_validate_json(text)
        if (shard.version, shard.key) != (_VERSION, self._key):
            raise ValueError("it is of other rows or settings")
        shard.sizes_array()
        return shard

    def add(self, shard: Shard) -> None:
        """Store the shard, so that its rows are not checked again."""
        # Half of a surrogate pair, which a row may have, becomes its escape in JSON.
        text = json.dumps(shard.model_copy(update={"key": self._key}).model_dump()).encode()
        data = hashlib.sha256(text).hexdigest().encode() + b"\n" + text
        if len(data) <= _LARGEST:
            self._storage.write(f"{self._folder}/{shard.first:012}.json", data)


def check_in_shards(
    source: Rows,
    chosen: Sequence[int],
    store: ShardStore,
    sizes: np.ndarray,
    *,
    processes: int,
    tell: Callable[[int], None] = lambda rows: None,
) -> list[Counted]:
    """Check the chosen rows in shards; the findings, equal warnings merged, are those of one process in the same order.

    Args:
        chosen: numbers of the file's rows, ascending.
        sizes: (chosen, 2) int32, filled with tokens and tiles of each row that could be encoded.
        tell: gets the number of rows that are done, after each shard.
    """
    spans = spans_of(len(chosen))
    stores = store.shared or len(spans) > 1  # a single shard is stored with the stage's own result
    stored = store.load() if stores else {}
    shards = {first: shard for first, shard in stored.items() if range(first, first + shard.rows) in spans}
    missing = [span for span in spans if span.start not in shards]
    done = sum(shard.rows for shard in shards.values())
    if done:
        logger.info("the results of %d of %d rows are in %s; they are not checked again", done, len(chosen), store.uri)
    tell(done)
    for shard in computed(source, chosen, missing, min(processes, len(missing))):
        if stores:
            store.add(shard)
        shards[shard.first] = shard
        done += shard.rows
        tell(done)
    for shard in shards.values():
        sizes[shard.first : shard.first + shard.rows] = shard.sizes_array()
    return count_repeated(counted for first in sorted(shards) for counted in shards[first].findings)


def spans_of(rows: int) -> list[range]:
    """The positions of each shard's rows among the chosen ones."""
    return [range(start, min(rows, start + SHARD_ROWS)) for start in range(0, rows, SHARD_ROWS)]


def check_shard(source: Rows, chosen: Sequence[int], span: range) -> Shard:
    """The result of the chosen rows at the positions of `span`."""
    sizes = np.zeros((len(span), 2), np.int32)
    findings = source.check(chosen[span.start : span.stop], sizes)
    return Shard(
        first=span.start,
        rows=len(span),
        findings=count_repeated((finding, 1) for finding in findings),
        sizes=base64.b64encode(sizes.astype("<i4").tobytes()).decode(),
    )


_inherited: tuple[Rows, Sequence[int]]


def computed(source: Rows, chosen: Sequence[int], spans: Iterable[range], processes: int) -> Iterator[Shard]:
    """Shards as they are finished; forked processes share the rows' memory. Takes a span when a process is free."""
    if processes < 2:
        yield from (check_shard(source, chosen, span) for span in spans)
        return
    global _inherited
    _inherited = source, chosen
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
        waiting: set[Future[Shard]] = set()
        left = iter(spans)
        while True:
            while len(waiting) < _WAITING * processes and (span := next(left, None)) is not None:
                waiting.add(pool.submit(_check, span))
            if not waiting:
                return
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)


def _begin() -> None:
    """Prepare a new process: it ends with its parent, and opens files of its own."""
    global _inherited
    die_with_parent()
    only_default_signals()
    source, chosen = _inherited
    _inherited = source.reopened(), chosen


def _check(span: range) -> Shard:
    return check_shard(*_inherited, span)

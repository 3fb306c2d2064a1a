"""This rank's share of the training state in host memory: what a checkpoint is written from and read into.

The buffer is made once and used by every checkpoint, so that a snapshot costs one copy from the GPU (pinned memory) and
no allocation. Its size is that of the share: 12 bytes for each trainable parameter that the rank owns.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from internvl_api.quantity import gib

from internvl_trainer.artifacts.disk_space import check_space
from internvl_trainer.metrics import free_container_memory
from internvl_trainer.train.optimizer_shards import Fragment

logger = logging.getLogger(__name__)

FILE_BYTES = 512 << 20
"""Most bytes of tensors in one file of a checkpoint."""
_ELEMENT_BYTES = 4  # fp32
_MARGIN = 1.1  # data workers and the allocator grow while training runs


class Piece(NamedTuple):
    """Elements [start, start + length) of a flattened parameter, as one file holds them."""

    name: str
    start: int
    length: int


class HostShare:
    """fp32 tensors in host memory for each fragment and kind.

    Args:
        kinds: the tensors held for each fragment.
        pinned: whether the fragments are on a GPU.
        processes: of this pod; each has a share of its own.
    """

    def __init__(self, fragments: Sequence[Fragment], kinds: Sequence[str], *, pinned: bool, processes: int) -> None:
        self.fragments, self.kinds, self._pinned = list(fragments), tuple(kinds), pinned
        self._owned = {fragment.name: fragment for fragment in fragments}
        buffer = _buffer(self.bytes_of(kinds) // _ELEMENT_BYTES, pinned=pinned, processes=processes)
        self._values: dict[tuple[str, str], torch.Tensor] = {}
        place = 0
        for fragment in fragments:
            for kind in kinds:
                self._values[kind, fragment.name] = buffer[place : place + fragment.length]
                place += fragment.length

    def bytes_of(self, kinds: Sequence[str]) -> int:
        """Bytes of these kinds of every fragment."""
        return sum(fragment.length for fragment in self.fragments) * _ELEMENT_BYTES * len(kinds)

    def take(self, kinds: Sequence[str]) -> None:
        """Copy these kinds of every fragment from the engine."""
        for fragment in self.fragments:
            for kind in kinds:
                fragment.read(kind, self._values[kind, fragment.name])
        if self._pinned:
            torch.cuda.synchronize()

    def put(self, kinds: Sequence[str]) -> None:
        """Copy these kinds of every fragment into the engine."""
        for fragment in self.fragments:
            for kind in kinds:
                fragment.write(kind, self._values[kind, fragment.name])

    def values(self, kind: str, piece: Piece) -> torch.Tensor:
        """(length,) of a piece; writing into it changes the share."""
        start = piece.start - self._owned[piece.name].start
        return self._values[kind, piece.name][start : start + piece.length]

    def files(self, kinds: Sequence[str]) -> Iterator[list[Piece]]:
        """The pieces of one file after the other, each with at most FILE_BYTES of these kinds; none is empty."""
        most = FILE_BYTES // (_ELEMENT_BYTES * len(kinds))
        pieces: list[Piece] = []
        room = most
        for fragment in self.fragments:
            begin, end = fragment.start, fragment.start + fragment.length
            while begin < end:
                length = min(room, end - begin)
                pieces.append(Piece(fragment.name, begin, length))
                begin, room = begin + length, room - length
                if room == 0:
                    yield pieces
                    pieces, room = [], most
        if pieces:
            yield pieces


def _buffer(elements: int, *, pinned: bool, processes: int) -> torch.Tensor:
    """An fp32 buffer in host memory; on the scratch disk when the container has no room for one in each process.

    Raises UserError `DiskFull` when neither has room.
    """
    needed, free = elements * _ELEMENT_BYTES, free_container_memory()
    if elements == 0 or free is None or needed * processes * _MARGIN <= free:
        return torch.empty(elements, dtype=torch.float32, pin_memory=pinned and elements > 0)
    folder = Path(tempfile.gettempdir())
    logger.warning(
        "the container has %s of memory left; the checkpoint's snapshot needs %s in each of %d processes and goes to "
        "the scratch disk, which takes longer. Raise the memory limit of podTemplate.resources",
        gib(free), gib(needed), processes,
    )  # fmt: skip
    check_space(folder, needed * processes, "the snapshot of a checkpoint, for which the memory limit has no room,")
    with tempfile.TemporaryDirectory() as mapped:  # its name may go: the mapping keeps the file
        return torch.from_file(str(Path(mapped) / "share"), shared=True, size=elements, dtype=torch.float32)

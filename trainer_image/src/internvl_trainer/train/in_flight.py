"""A checkpoint that is being stored, and the figures of one that is complete."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from internvl_trainer.artifacts.manifest import Manifest
from internvl_trainer.train.share_files import Stored


@dataclass
class InFlight:
    """A checkpoint from its snapshot until it is complete.

    Attributes:
        storing: this rank's files.
        committing: the manifest, on rank 0 once every rank has stored its files.
        sent: bytes that this rank has stored.
        best: the step with the lowest loss on data.validation by then; None where none was taken.
        is_last: whether no step follows.
    """

    step: int
    folder: str
    best: int | None
    is_last: bool
    shapes: dict[str, list[int]]
    kinds: tuple[str, ...]
    size: int
    began: float
    storing: Future[Stored]
    committing: Future[Manifest] | None = None
    is_stored: bool = False
    sent: int = 0
    store_seconds: float = 0.0


@dataclass(frozen=True)
class Saved:
    """Figures of a complete checkpoint.

    Attributes:
        seconds: from the snapshot to the manifest.
        store_seconds: of this rank's upload.
        size: bytes of all files, on rank 0; 0 on the others.
    """

    step: int
    seconds: float
    store_seconds: float
    size: int

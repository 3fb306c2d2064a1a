"""Parts of remote files: ranges of bytes, all of one version, read without downloading the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential
from tenacity.retry import retry_base

from internvl_trainer.artifacts.storage import StoredFile
from internvl_trainer.errors import Unavailable

_CHUNK = 32 << 20  # the most that is read again after a broken connection
_ATTEMPTS = 6


class RangesUnsupported(Unavailable):
    """The server does not give parts of a file, or does not say which version of the file they are of."""


class SourceChanged(Unavailable):
    """The file is another one than when it was listed."""


class RangeSource(Protocol):
    """Files under one URI that can be read in parts."""

    uri: str

    def list(self) -> Iterator[StoredFile]:
        """Every file, with the etag that `read_range` asks for."""
        ...

    def read_range(self, file: StoredFile, start: int, end: int) -> bytes:
        """Bytes [start, end) of this version of a file.

        Raises:
            RangesUnsupported: the server answers with something else than these bytes.
            SourceChanged: there is another version now.
            Unavailable: no answer, or a shorter one.
        """
        ...


@dataclass(frozen=True)
class RemoteFile:
    """One version of a file at its source."""

    source: RangeSource
    file: StoredFile

    def read(self, start: int, end: int) -> bytearray:
        """Bytes [start, end), asked for in bounded requests; a request that fails is sent again. Raises UserError."""
        data, read = bytearray(end - start), retrying(retry_if_exception(_may_pass))
        for place in range(start, end, _CHUNK):
            stop = min(end, place + _CHUNK)
            data[place - start : stop - start] = read(self.source.read_range, self.file, place, stop)
        return data


def check_answer(place: str, status: int, told: str | None, start: int, end: int, size: int) -> None:
    """Raises RangesUnsupported unless an answer has the bytes [start, end) of a file of `size` bytes.

    Args:
        told: the answer's Content-Range.
    """
    wanted = f"bytes {start}-{end - 1}/{size}"
    if status != 206 or told != wanted:
        raise RangesUnsupported(
            "RangesUnsupported",
            f"{place}: asked for {wanted}, the server answers {status} with {(told or 'no Content-Range')[:80]!r}; "
            "expected 206 with that range",
        )


def check_length(place: str, data: bytes, expected: int) -> None:
    """Raises Unavailable for an answer of another length than expected."""
    if len(data) != expected:
        raise Unavailable("DownloadIncomplete", f"{place}: {len(data)} of {expected} bytes arrived; try again")


def changed(place: str) -> SourceChanged:
    """The error for a file that is not the listed one any more."""
    return SourceChanged("DownloadIncomplete", f"{place} changed while it was read; try again")


def retrying(retry: retry_base) -> Retrying:
    """Calls what reads again, with growing pauses, after the errors of `retry`; the last error is raised."""
    return Retrying(
        stop=stop_after_attempt(_ATTEMPTS),
        wait=wait_exponential(0.1, max=10),
        retry=retry,
        reraise=True,
    )


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, Unavailable) and not isinstance(error, RangesUnsupported | SourceChanged)

"""Which fault of GPU, driver, NCCL, network or memory an exception or an aborted process is about."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

from internvl_api import faults
from internvl_api.faults import Diagnosis

_LONGEST_CHAIN = 8  # exceptions
# What torch's C++ threads write before they abort the process. Log lines before it can quote anything.
_LAST_WORDS = re.compile(
    r"(?<=terminated with exception: )|(?<=what\(\):  )|Watchdog caught collective operation timeout: |"
    r"ProcessGroupNCCL's watchdog got stuck for "
)


def diagnose(error: BaseException) -> Diagnosis | None:
    """The fault behind an exception, in it or in what caused it; a lost peer only where nothing else is known."""
    found = [diagnosis for each in _chain(error) if (diagnosis := faults.find(_text(each)))]
    own = [diagnosis for diagnosis in found if diagnosis.fault.blame != "peer"]
    return next(iter([*own, *found]), None)


def diagnose_abort(printed: str) -> Diagnosis | None:
    """The fault that a process named on stderr before a C++ thread aborted it."""
    last_words = _LAST_WORDS.search(printed)
    return faults.find(printed[last_words.start() :]) if last_words else None


def is_gpu_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory was full, as torch's allocator, CUDA, a CUDA library or NCCL says it."""
    found = faults.find(_text(error))
    return found is not None and found.fault.blame == "batch"


def explain(found: Diagnosis, rank: str | None = None) -> str:
    """A message: which rank (default: this process's), what was printed, and the next step."""
    rank = rank or os.environ.get("RANK")
    who = f"rank {rank}: " if rank else ""
    return f"{who}{found.line}" + (f"; {found.fault.advice}" if found.fault.advice else "")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, its cause, that one's cause and so on."""
    each: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if each is None:
            return
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _text(error: BaseException) -> str:
    """The exception as the last lines of a traceback; empty for one that names a file, which may be called anything."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"OSError: {OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))}" if error.errno == errno.ENOMEM else ""
    if isinstance(error, MemoryError):  # numpy has its own
        return f"MemoryError: {error}"
    kind = type(error)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}: {error}"

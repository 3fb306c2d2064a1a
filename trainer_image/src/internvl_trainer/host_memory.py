"""The allocator's settings for a process that works with large tensors in host memory."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 1 << 20  # bytes


def give_memory_back() -> None:
    """Make glibc map every large tensor separately, so that freeing it returns the memory to the system.

    By default malloc keeps tensors of up to 32 MB in a heap, which grows with every small tensor that is put between
    them: by some 20 MB a layer when a 2B model is merged, and by the size of the model when it is partitioned.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)

"""Rotary embeddings whose frequencies depend on the length of the sequence, without asking the device for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def known_length(rotary: Any, longest: int) -> Iterator[None]:
    """Keep a dynamic rotary embedding from reading the position ids, where `longest` tokens leave it as it is.

    transformers compares the largest position with the length of the original training, twice a pass, on the host.
    InternLM2 is dynamic (`rope_scaling`), and its rows hardly ever exceed that length.

    Args:
        rotary: of transformers' language model.
        longest: tokens of the longest row.
    """
    if not _stays(rotary, longest):
        yield
        return
    kind, rotary.rope_type = rotary.rope_type, "default"
    try:
        yield
    finally:
        rotary.rope_type = kind


def _stays(rotary: Any, longest: int) -> bool:
    if "dynamic" not in rotary.rope_type:
        return False
    cached, original = rotary.max_seq_len_cached, rotary.original_max_seq_len
    return isinstance(cached, int) and longest <= original and cached <= original  # a tensor after longer rows

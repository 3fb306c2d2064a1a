"""Rotary embeddings whose frequencies depend on the length of the sequence: those of each row in a flat batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Embed = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def each_row_alone(rotary: Any, lengths: Sequence[int]) -> Iterator[None]:
    """Give each row of a flat batch the frequencies that it has alone, whatever rows came before or lie beside it.

    transformers chooses them by the largest position in the batch: InternLM2 (`dynamic`) and Phi-3 (`longrope`) have
    others above the length of their original training. Where no row is longer, nothing waits for the device.

    Args:
        rotary: of transformers' language model.
        lengths: tokens of each row.
    """
    limit = constant_up_to(rotary.config)
    if limit is None:
        yield
        return
    _forget_length(rotary)
    kind, embed = rotary.rope_type, rotary.forward
    if max(lengths) <= limit:
        rotary.rope_type = "default"  # compares no position with the limit
    else:
        rotary.forward = _in_rows(rotary, embed, lengths)
    try:
        yield
    finally:
        rotary.rope_type = kind
        vars(rotary).pop("forward", None)
        _forget_length(rotary)


def constant_up_to(text_config: Any) -> int | None:
    """Tokens of a row up to which its rotary frequencies are constant; None when they always are."""
    rope = text_config.rope_parameters
    if rope["rope_type"] not in ("dynamic", "longrope"):
        return None
    return int(rope.get("original_max_position_embeddings") or text_config.max_position_embeddings)


def _in_rows(rotary: Any, embed: Embed, lengths: Sequence[int]) -> Embed:
    """The embedding, of one row after the other."""

    def forward(hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = []
        for positions in torch.split(position_ids, list(lengths), dim=1):
            _forget_length(rotary)
            parts.append(embed(hidden, positions))
        cosines, sines = zip(*parts, strict=True)
        return torch.cat(cosines, dim=1), torch.cat(sines, dim=1)

    return forward


def _forget_length(rotary: Any) -> None:
    """Give the embedding the frequencies of the original training again; it keeps those of a longer row."""
    rotary.max_seq_len_cached = rotary.original_max_seq_len
    rotary.inv_freq = rotary.original_inv_freq.to(rotary.inv_freq.device, copy=True)  # longrope writes into it

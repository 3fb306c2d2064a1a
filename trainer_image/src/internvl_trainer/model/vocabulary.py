"""The rows of a language model's embeddings, for a tokenizer that was extended after the model was trained."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

EMBEDDINGS = ("language_model.embed_tokens.weight", "lm_head.weight")
"""Ends of the native names of the matrices that have a row for each token."""


def needed_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for every id of the tokenizer."""
    return max(tokenizer.get_vocab().values()) + 1


def grow_vocabulary(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise the native config's vocabulary to the tokenizer's ids; a larger one stays."""
    text = config.text_config
    text.vocab_size = max(text.vocab_size, needed_rows(tokenizer))


def grow_rows(embedding: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows, hidden) from fewer rows: each new one is the mean of all old ones, taken in fp32.

    A new token thus begins as the model's average token, with the same bits on every machine and rank.
    """
    mean = embedding.float().mean(dim=0, keepdim=True).to(embedding.dtype)
    return torch.cat([embedding, mean.expand(rows - len(embedding), -1)])


def can_grow(name: str, tensor: torch.Tensor, shape: torch.Size) -> bool:
    """Whether a stored tensor is an embedding that lacks only rows."""
    is_matrix = name.endswith(EMBEDDINGS) and tensor.ndim == len(shape) == 2
    return is_matrix and tensor.shape[1] == shape[1] and tensor.shape[0] < shape[0]

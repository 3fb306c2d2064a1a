"""Attention in upstream's own order of operations, which rounds as upstream's numbers were rounded.

It is what runs without a GPU. PyTorch's fused attention gives the same to about 4 ulp, which contrast's temperature
makes visible.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AttentionInterface

VISION_REFERENCE, QLLAMA_REFERENCE = "internvit_reference", "qllama_reference"


def scaled_queries(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, d) of InternViT and of the pooling blocks: queries are scaled before they meet the keys."""
    return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1) @ value


def scaled_scores(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, heads, N, d) of QLLaMA: scores are divided, masked, and become weights in fp32."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def _vision(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    return scaled_queries(query, key, value).transpose(1, 2), None


def _qllama(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    return scaled_scores(query, key, value, mask).transpose(1, 2), None


AttentionInterface.register(VISION_REFERENCE, _vision)
AttentionInterface.register(QLLAMA_REFERENCE, _qllama)

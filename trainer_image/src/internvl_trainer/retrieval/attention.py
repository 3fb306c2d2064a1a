"""Attention in upstream's order of operations, and the pooling blocks made of it.

This order rounds exactly as upstream does, and runs where there is no GPU. PyTorch's fused attention differs by up to
about 4 ulp, which the temperature of contrast makes visible.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

VISION_REFERENCE, QLLAMA_REFERENCE = "internvit_reference", "qllama_reference"
_EPSILON = 1e-5  # of the pooling blocks' layer norms


def scaled_queries(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, d) attention of InternViT and the pooling blocks: queries are scaled before the product."""
    weights: torch.Tensor = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1)
    return weights @ value


def scaled_scores(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, heads, N, d) attention of QLLaMA: scores are divided, masked, and normalised in fp32."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def split_heads(features: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, heads x d) to (B, heads, N, d)."""
    return torch.unflatten(features, -1, (heads, -1)).transpose(1, 2)


def merge_heads(features: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, d) to (B, N, heads x d)."""
    return features.transpose(1, 2).flatten(2)


def _vision(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    return scaled_queries(query, key, value).transpose(1, 2), None


def _qllama(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    return scaled_scores(query, key, value, mask).transpose(1, 2), None


class _PoolAttention(nn.Module):
    """Multi-head attention with the biases of its projections as separate tensors, as in upstream's checkpoints."""

    def __init__(self, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(3))
        self.proj = nn.Linear(width, out_width)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q = split_heads(self.q(query) + self.q_bias, self.heads)
        k = split_heads(self.k(key) + self.k_bias, self.heads)
        v = split_heads(self.v(value) + self.v_bias, self.heads)
        projected: torch.Tensor = self.proj(merge_heads(scaled_queries(q, k, v)))
        return projected


class AttentionPool(nn.Module):
    """Attention pooling, (B, N, width) to (B, out_width): the mean of the sequence is the query."""

    def __init__(self, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (nn.LayerNorm(width, eps=_EPSILON) for _ in range(3))
        self.cross_attn = _PoolAttention(width, heads, out_width)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        query = self.norm1_q(sequence.mean(1, keepdim=True))
        pooled: torch.Tensor = self.cross_attn(query, self.norm1_k(sequence), self.norm1_v(sequence))
        return pooled.squeeze(1)


AttentionInterface.register(VISION_REFERENCE, _vision)
AttentionInterface.register(QLLAMA_REFERENCE, _qllama)

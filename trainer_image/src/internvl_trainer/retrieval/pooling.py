"""Attention pooling: a sequence of features to one vector in the space of captions."""

from __future__ import annotations

import torch
from torch import nn

from internvl_trainer.retrieval.attention import scaled_queries

_EPSILON = 1e-5  # of the layer norms; upstream sets it beside PyTorch's equal default


class _PoolAttention(nn.Module):
    """Multi-head attention whose projections have their biases apart, as upstream's checkpoints do."""

    def __init__(self, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(3))
        self.proj = nn.Linear(width, out_width)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q = self._split(self.q(query) + self.q_bias)
        k = self._split(self.k(key) + self.k_bias)
        v = self._split(self.v(value) + self.v_bias)
        projected: torch.Tensor = self.proj(scaled_queries(q, k, v).transpose(1, 2).flatten(2))
        return projected

    def _split(self, features: torch.Tensor) -> torch.Tensor:
        return features.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class AttentionPool(nn.Module):
    """The sequence's mean asks, the sequence answers: (B, N, width) to (B, out_width)."""

    def __init__(self, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (nn.LayerNorm(width, eps=_EPSILON) for _ in range(3))
        self.cross_attn = _PoolAttention(width, heads, out_width)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        query = self.norm1_q(sequence.mean(1, keepdim=True))
        pooled: torch.Tensor = self.cross_attn(query, self.norm1_k(sequence), self.norm1_v(sequence))
        return pooled.squeeze(1)

"""QLLaMA: a LLaMA in which the leading query slots attend to image features in every n-th layer.

It extends transformers' Llama, with its cache and generation, by the argument `vision_hidden_states`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaPreTrainedModel, LlamaRMSNorm

from internvl_trainer.retrieval.architecture import QLlamaConfig
from internvl_trainer.retrieval.attention import QLLAMA_REFERENCE, merge_heads, scaled_scores, split_heads


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask to add to scores: 0 where a position is visible, else the dtype's lowest number.

    With minus infinity, a row that sees nothing (padding) would become NaN.
    """
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def causal(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """(rows, columns) bool: each of the last `rows` of `columns` positions sees itself and earlier ones."""
    positions = torch.arange(columns, device=device)
    return positions <= positions[columns - rows :, None]


def generation_mask(attention_mask: torch.Tensor, rows: int, slots: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, rows, columns) additive mask: causal, except that all query slots see one another.

    Args:
        attention_mask: (B, columns), 0 on padding; the last `rows` positions are new.
    """
    columns = attention_mask.shape[1]
    positions = torch.arange(columns, device=attention_mask.device)
    queries = (positions < slots) & (positions[columns - rows :, None] < slots)
    visible = causal(rows, columns, attention_mask.device) & attention_mask.bool()[:, None, None, :] | queries
    return additive_mask(visible, dtype)


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value)


class CrossAttention(nn.Module):
    """Attention of query slots to image features, without mask or positions."""

    def __init__(self, config: QLlamaConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.attend = scaled_scores if config._attn_implementation == QLLAMA_REFERENCE else _fused
        hidden, width = config.hidden_size, config.cross_attention_width
        self.norm1 = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.norm2 = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(width, hidden, bias=False)
        self.v_proj = nn.Linear(width, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, slots: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
        """(B x n, slots, hidden) from slots of that shape and (B, patches, width) image features.

        Row i of the slots attends to image i modulo B.
        """
        vision = self.norm2(vision)
        query = split_heads(self.q_proj(self.norm1(slots)), self.heads)
        repeats = len(slots) // len(vision)
        key = split_heads(self.k_proj(vision), self.heads).repeat(repeats, 1, 1, 1)
        value = split_heads(self.v_proj(vision), self.heads).repeat(repeats, 1, 1, 1)
        projected: torch.Tensor = self.o_proj(merge_heads(self.attend(query, key, value)))
        return projected


class QLlamaLayer(LlamaDecoderLayer):  # type: ignore[no-untyped-call]  # its base's __init_subclass__
    """A LLaMA layer with cross-attention between self-attention and feed-forward."""

    def __init__(self, config: QLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.slots = config.cross_attention_slots
        self.cross_attn = CrossAttention(config)

    def forward(  # type: ignore[override]  # positional arguments are keywords here
        self, hidden_states: torch.Tensor, *, vision_hidden_states: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        if vision_hidden_states is not None and hidden_states.shape[1] >= self.slots:
            slots, text = hidden_states[:, : self.slots], hidden_states[:, self.slots :]
            hidden_states = torch.cat([slots + self.cross_attn(slots, vision_hidden_states), text], dim=1)
        output: torch.Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return output


class QLlamaModel(LlamaModel):  # type: ignore[no-untyped-call]
    """QLLaMA's decoder; `attention_mask` is (B, columns) during generation, else additive (B, 1, rows, columns)."""

    config: QLlamaConfig

    def __init__(self, config: QLlamaConfig) -> None:
        super().__init__(config)
        for index in range(0, config.num_hidden_layers, config.cross_attention_frequency):
            self.layers[index] = QLlamaLayer(config, index)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Any = None,
        vision_hidden_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if attention_mask is not None and attention_mask.ndim == 2:
            rows, slots = inputs_embeds.shape[1], self.config.num_query_token
            # Padding between the slots and the prompt must not shift the prompt's positions.
            kwargs["position_ids"] = (attention_mask.cumsum(1) - 1)[:, -rows:]
            attention_mask = generation_mask(attention_mask, rows, slots, inputs_embeds.dtype)
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            vision_hidden_states = None  # only the query slots attend to it, and they are in the cache
        return super().forward(
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            vision_hidden_states=vision_hidden_states,
            **kwargs,
        )


class QLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """QLLaMA with its language head."""

    config: QLlamaConfig

    def __init__(self, config: QLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # LlamaForCausalLM's would build a second, plain decoder
        self.model = QLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, vision_hidden_states: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """LlamaForCausalLM's forward with (B, patches, width) image features; generate needs the named argument."""
        return super().forward(*args, vision_hidden_states=vision_hidden_states, **kwargs)

"""From a checkpoint directory to a model in memory; nothing in the directory is ever executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .chat_model import ChatModel


class CheckpointError(UserError):
    """The checkpoint directory cannot be used as it is."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that was learnt about it on the way in.

    Attributes:
        model: parameters in `dtype` on the CPU (or partitioned, under ZeRO-3).
        tokenizer: with the checkpoint's own special tokens; `<IMG_CONTEXT>` is `model.native.config.image_token_id`.
        upstream_config: config.json as it was read (None for a native, hf-format directory).
        kind: language-model family: qwen2 | internlm2 | llama | phi3.
        template: name of the conversation template that the checkpoint was trained with.
        image_size: pixels of a tile's side; context_tokens: `<IMG_CONTEXT>` tokens for each tile.
        attn_implementation: what runs: flash_attention_2 | sdpa | eager.
    """

    model: ChatModel
    tokenizer: PreTrainedTokenizerBase
    upstream_config: dict[str, Any] | None
    kind: str
    template: str
    image_size: int
    context_tokens: int
    attn_implementation: str


def load_chat_model(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str | None = None,
    image_size: int | None = None,
    drop_path_rate: float = 0.0,
    pixel_shuffle_version: str | None = None,
    select_layer: int | None = None,
    zero3_config: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Read an upstream-format (model_type internvl_chat) or native hf-format directory.

    Args:
        image_size: another tile size than the checkpoint's resizes the position embeddings.
        pixel_shuffle_version, select_layer: override what the checkpoint's config says.
        zero3_config: the DeepSpeed config (a dict with zero_optimization.stage 3), after deepspeed.init_distributed():
            parameters are partitioned as they are made and filled one by one from rank 0. None otherwise.

    Raises:
        CheckpointError: with the file and what to do.
    """
    raise NotImplementedError

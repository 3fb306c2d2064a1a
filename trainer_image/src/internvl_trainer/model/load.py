"""A chat model loaded from a checkpoint directory; no file of the directory is ever executed."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase

from .chat_model import ChatModel
from .checkpoint_format import Architecture
from .checkpoint_source import open_checkpoint
from .parameters import empty_parameters, fill_parameters
from .tokenizer import CONTEXT_TOKEN, load_tokenizer
from .vocabulary import grow_vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A chat model with its tokenizer and what its directory says about it.

    Attributes:
        model: parameters in the chosen dtype on the CPU, or partitioned under ZeRO-3.
        tokenizer: with the checkpoint's special tokens; `<IMG_CONTEXT>` is `model.native.config.image_token_id`.
        upstream_config: upstream's config.json; None for a native directory that does not keep it.
        attn_implementation: flash_attention_2, sdpa or eager.
        is_native: the directory is in transformers' format, not in upstream's.
    """

    model: ChatModel
    tokenizer: PreTrainedTokenizerBase
    upstream_config: dict[str, Any] | None
    architecture: Architecture
    attn_implementation: str
    is_native: bool

    @property
    def kind(self) -> str:
        """Family of the language model: qwen2, internlm2, llama or phi3."""
        return self.architecture.kind

    @property
    def template(self) -> str:
        """Name of the conversation template that the checkpoint was trained with."""
        return self.architecture.template

    @property
    def image_size(self) -> int:
        """Pixels of a tile's side."""
        return self.architecture.image_size

    @property
    def vocabulary(self) -> int:
        """Rows of the language model's embeddings."""
        return int(self.model.native.config.text_config.vocab_size)

    @property
    def context_tokens(self) -> int:
        """`<IMG_CONTEXT>` tokens for one tile."""
        return self.architecture.context_tokens


def load_chat_model(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str | None = None,
    image_size: int | None = None,
    drop_path_rate: float = 0.0,
    pixel_shuffle_version: str | None = None,
    select_layer: int | None = None,
    resize_embeddings: bool = False,
    zero3_config: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """The model of a directory in upstream's format (model_type internvl_chat) or transformers' (internvl).

    Args:
        attn_implementation: None uses flash_attention_2 where it is available, else sdpa.
        image_size: pixels of a tile's side; another size than the checkpoint's resizes the position embeddings.
        pixel_shuffle_version, select_layer: override the checkpoint's config.
        resize_embeddings: give the language model's embeddings a row for every id of the tokenizer.
        zero3_config: the DeepSpeed config with zero_optimization.stage 3; None otherwise. After
            deepspeed.init_distributed(), parameters are partitioned when they are made and filled one by one from
            rank 0, so no process holds the whole model.

    Raises:
        CheckpointError: with the file and the next step.
    """
    directory = Path(directory)
    source = open_checkpoint(directory)
    tokenizer = load_tokenizer(directory)
    changes: dict[str, Any] = {
        "image_size": image_size,
        "pixel_shuffle_version": pixel_shuffle_version,
        "select_layer": select_layer,
    }
    architecture = replace(source.architecture, **{key: value for key, value in changes.items() if value is not None})
    config: Any = settle_config(source.config, architecture, tokenizer, dtype)
    if resize_embeddings:
        grow_vocabulary(config, tokenizer)
    attention = attn_implementation or choose_attention()
    config._attn_implementation = attention
    logger.info("attention implementation: %s", attention)

    with empty_parameters(zero3_config, dtype):
        native = InternVLForConditionalGeneration(config)
    fill_parameters(native, source, dtype, partitioned=zero3_config is not None, grows=resize_embeddings)
    model = ChatModel(native, architecture)
    if drop_path_rate > 0:
        model.set_drop_path(drop_path_rate)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        upstream_config=source.upstream_config,
        architecture=architecture,
        attn_implementation=attention,
        is_native=source.is_native,
    )


def settle_config(
    config: Any, architecture: Architecture, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> InternVLConfig:
    """A copy of the native config with the tokenizer's image token, the architecture's choices and the dtype."""
    config = copy.deepcopy(config)
    config.image_token_id = int(tokenizer.get_vocab()[CONTEXT_TOKEN])
    config.vision_config.image_size = (architecture.image_size, architecture.image_size)
    config.image_seq_length = architecture.context_tokens
    config.vision_feature_layer = architecture.select_layer
    config.dtype = config.vision_config.dtype = config.text_config.dtype = dtype
    settled: InternVLConfig = config
    return settled


def choose_attention() -> str:
    """flash_attention_2 when its package and a GPU are available, else sdpa."""
    has_flash = importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()
    return "flash_attention_2" if has_flash else "sdpa"

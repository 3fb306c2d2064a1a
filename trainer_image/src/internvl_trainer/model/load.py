"""A chat model loaded from a checkpoint directory; no file of the directory is ever executed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase

from .attention import choose_attention
from .chat_model import ChatModel
from .checkpoint_format import Architecture
from .checkpoint_format.files import TensorEntry
from .checkpoint_source import open_checkpoint
from .language_shard import LanguageShard
from .parameters import CPU, empty_parameters, fill_parameters, whole_model
from .tokenizer import CONTEXT_TOKEN, load_tokenizer
from .vocabulary import grow_vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A chat model with its tokenizer and what its directory says about it.

    Attributes:
        model: parameters in the chosen dtype on the chosen device, or partitioned under ZeRO-3.
        tokenizer: with the checkpoint's special tokens; `<IMG_CONTEXT>` is `model.native.config.image_token_id`.
        upstream_config: upstream's config.json; None for a native directory that does not keep it.
        attn_implementation: a name of `attention.KERNELS`, or one of transformers'.
        shard: of the language model, which several processes then hold together.
    """

    model: ChatModel
    tokenizer: PreTrainedTokenizerBase
    upstream_config: dict[str, Any] | None
    architecture: Architecture
    attn_implementation: str
    shard: LanguageShard | None = None

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
    device: torch.device = CPU,
    attn_implementation: str | None = None,
    image_size: int | None = None,
    drop_path_rate: float = 0.0,
    pixel_shuffle_version: str | None = None,
    select_layer: int | None = None,
    resize_embeddings: bool = False,
    zero3_config: Mapping[str, Any] | None = None,
    entries: list[TensorEntry] | None = None,
    is_skipped: Callable[[str], bool] = lambda _: False,
    prepare: Callable[[ChatModel, str], None] | None = None,
    make_shard: Callable[[Any], LanguageShard | None] = lambda _: None,
) -> LoadedModel:
    """The model of a directory in upstream's format (model_type internvl_chat) or transformers' (internvl).

    Each tensor goes straight from its file to `device`: host memory holds one at a time.

    Args:
        attn_implementation: None uses `choose_attention`.
        image_size: pixels of a tile's side; another size than the checkpoint's resizes the position embeddings.
        pixel_shuffle_version, select_layer: override the checkpoint's config.
        resize_embeddings: give the language model's embeddings a row for every id of the tokenizer.
        zero3_config: the DeepSpeed config with zero_optimization.stage 3; None otherwise. After
            deepspeed.init_distributed(), parameters are partitioned when they are made, and every rank reads its own
            share of each: no process reads or holds the whole model. All ranks call this function.
        entries: the tensors, where they are not in the directory.
        is_skipped: the native names of parameters that become zero, with nothing read of them.
        make_shard: the language model's config to this process's shard of it; None holds it whole.
        prepare: gets the model and the native name of each parameter as soon as it has its value (see quantize).

    Raises:
        CheckpointError: with the file and the next step.
    """
    directory = Path(directory)
    source = open_checkpoint(directory, entries)
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
    attention = attn_implementation or choose_attention(device, dtype)
    config._attn_implementation = attention
    logger.info("attention implementation: %s", attention)

    shard = make_shard(config.text_config)
    with empty_parameters(zero3_config, dtype):
        native = InternVLForConditionalGeneration(shard.shrink(config) if shard else config)
    model = ChatModel(native, architecture)
    fill_parameters(
        native,
        source,
        dtype,
        device=device,
        partitioned=zero3_config is not None,
        grows=resize_embeddings,
        share=shard,
        whole=whole_model(config) if shard else None,
        is_skipped=is_skipped,
        filled=lambda name: prepare(model, name) if prepare else None,
    )
    if shard is not None:
        shard.join(native)
    if zero3_config is None:
        model.to(device)  # buffers
    if drop_path_rate > 0:
        model.set_drop_path(drop_path_rate)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        upstream_config=source.upstream_config,
        architecture=architecture,
        attn_implementation=attention,
        shard=shard,
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

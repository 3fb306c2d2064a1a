"""Logits of a checkpoint with one layer in memory at a time, to check models larger than the machine's memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # type: ignore[import-untyped]
from accelerate.utils import PrefixedDataset  # type: ignore[import-untyped]
from peft import inject_adapter_in_model
from torch import nn
from torch.nn import functional
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerBase

from internvl_trainer.model.adapter_files import Adapter, file_name
from internvl_trainer.model.adapters import ADAPTER, is_adapter, native_name
from internvl_trainer.model.chat_model import ChatModel
from internvl_trainer.model.checkpoint_format import Architecture
from internvl_trainer.model.checkpoint_format.files import read_tensor
from internvl_trainer.model.checkpoint_format.shards import Change, unchanged
from internvl_trainer.model.checkpoint_source import Source
from internvl_trainer.model.load import settle_config
from internvl_trainer.model.parameters import empty_parameters

_EMBEDDINGS, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
_HEAD_ROWS = 8192  # of the vocabulary, multiplied at a time


class NativeWeights(Mapping[str, torch.Tensor]):
    """Tensors of a checkpoint and an adapter under the model's names, read on access."""

    def __init__(self, source: Source, change: Change, adapter: Adapter | None) -> None:
        self._pieces = {piece.name: piece for piece in source.pieces()}
        self._source, self._change, self._adapter = source, change, adapter

    def stored(self, name: str) -> torch.Tensor:
        """A native tensor in its stored dtype."""
        return self._change(name, self._pieces[name].make(read_tensor, self._source.architecture))

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor in fp32, which adds no rounding to the file's."""
        if is_adapter(name) and self._adapter is not None:
            return self._adapter.tensors[file_name(name)].float()
        return self.stored(native_name(name) or name).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


@torch.no_grad()
def layerwise_logits(
    source: Source,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    batch: Mapping[str, Any],
    *,
    positions: int,
    change: Change = unchanged,
    adapter: Adapter | None = None,
) -> torch.Tensor:
    """(1, positions, vocab) fp32 logits of the last positions of a batch, as `collate` makes it, on the CPU.

    Args:
        architecture: the source's, possibly with another tile size.
        change: of the checkpoint's tensors.
        adapter: added to the model and computed by PEFT, without a merge.
    """
    config: Any = settle_config(source.config, architecture, tokenizer, torch.float32)
    config._attn_implementation = "sdpa"
    weights = NativeWeights(source, change, adapter)
    with empty_parameters(None, torch.float32):
        model = ChatModel(InternVLForConditionalGeneration(config), architecture)
    if adapter is not None:
        inject_adapter_in_model(adapter.config, model.native, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    _read_as_needed(model.eval(), weights)
    hidden = model.language_model(
        inputs_embeds=model.embed(batch["input_ids"], batch["pixel_values"], batch["image_flags"]),
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state[:, -positions:]
    head = weights.stored(_HEAD)
    return torch.cat([functional.linear(hidden, rows.float()) for rows in torch.split(head, _HEAD_ROWS)], dim=-1)


def _read_as_needed(model: ChatModel, weights: NativeWeights) -> None:
    """Make each layer read its weights before it runs and drop them afterwards; embeddings are read row by row."""
    model.language_model.get_input_embeddings().forward = lambda ids: weights.stored(_EMBEDDINGS)[ids].float()
    for name, module in _units(model.native.model, "model"):
        hook = AlignDevicesHook(
            "cpu", offload=True, weights_map=PrefixedDataset(weights, f"{name}."), place_submodules=True
        )
        add_hook_to_module(module, hook)


def _units(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers, and outside of them the smallest modules with weights of their own."""
    for leaf, child in module.named_children():
        inner = f"{name}.{leaf}"
        if isinstance(module, nn.ModuleList) or next(child.parameters(recurse=False), None) is not None:
            if not isinstance(child, nn.Embedding):
                yield inner, child
        else:
            yield from _units(child, inner)

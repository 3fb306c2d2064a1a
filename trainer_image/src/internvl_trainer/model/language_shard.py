"""Tensor parallelism of the language model: several processes hold each layer together (Megatron-LM, arXiv:1909.08053).

Every process has some heads of each attention and some channels of each MLP, and the sum of their outputs is the
layer's. Embeddings, norms, head, projector and vision tower are whole in each. The native model is built for its share
of heads, and its weights are cut while they are read; transformers' own plans load only through from_pretrained, which
does not know upstream's format.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .checkpoint_format.shards import Part

_WEIGHT = re.compile(r"model\.language_model\.layers\.\d+\.(?:self_attn|mlp)\.(?P<module>\w+)\.(?P<leaf>weight|bias)")
_BIASED_SUMS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class LanguageShard:
    """The share of process `rank` of `size`.

    Attributes:
        text: the language model's whole config.
        group: torch's process group of these processes.
    """

    rank: int
    size: int
    text: Any
    group: Any

    @property
    def stores(self) -> bool:
        """True on the process that writes what all of them computed alike."""
        return self.rank == 0

    def shrink(self, config: Any) -> Any:
        """The native config with this share of heads and channels."""
        config = copy.deepcopy(config)
        text = config.text_config
        text.head_dim = self._head_dim
        text.num_attention_heads //= self.size
        text.num_key_value_heads = self._kv_heads
        text.intermediate_size //= self.size
        return config

    def join(self, native: Any) -> None:
        """Make each attention and MLP of `native`, which has its weights, add up the outputs of all processes."""
        for layer in native.model.language_model.layers:
            for module in (layer.self_attn, layer.mlp):
                module.register_forward_hook(self._add_up)
                if self.rank > 0:  # else each process would add the bias
                    _drop_bias(module)

    def part(self, name: str) -> Part | None:
        """The rows or columns of a native tensor that this process holds; None is all of it."""
        found = _WEIGHT.fullmatch(name)
        if found is None:
            return None
        module, head = found["module"], self._head_dim
        heads = self._share(self.text.num_attention_heads)
        first = self.rank * self.text.num_key_value_heads // self.size  # processes share a head if there are too few
        kv = first, first + self._kv_heads
        channels = self._share(self.text.intermediate_size)
        if module in _BIASED_SUMS:
            inputs = _times(heads, head) if module == "o_proj" else channels
            return Part(1, (inputs,)) if found["leaf"] == "weight" else None
        match module:
            case "q_proj":
                return Part(0, (_times(heads, head),))
            case "k_proj" | "v_proj":
                return Part(0, (_times(kv, head),))
            case "qkv_proj":
                keys = self.text.num_attention_heads
                values = keys + self.text.num_key_value_heads
                return Part(0, tuple(_times(each, head) for each in (heads, _moved(kv, keys), _moved(kv, values))))
            case "gate_up_proj":
                return Part(0, (channels, _moved(channels, self.text.intermediate_size)))
        return Part(0, (channels,))  # gate_proj, up_proj

    @property
    def _head_dim(self) -> int:
        return int(getattr(self.text, "head_dim", None) or self.text.hidden_size // self.text.num_attention_heads)

    @property
    def _kv_heads(self) -> int:
        return max(1, int(self.text.num_key_value_heads) // self.size)

    def _share(self, count: int) -> tuple[int, int]:
        return self.rank * count // self.size, (self.rank + 1) * count // self.size

    def _add_up(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        partial = output[0] if isinstance(output, tuple) else output
        torch.distributed.all_reduce(partial, group=self.group)
        return output


def _drop_bias(module: nn.Module) -> None:
    for name in _BIASED_SUMS:
        bias = getattr(getattr(module, name, None), "bias", None)
        if bias is not None:
            with torch.no_grad():
                bias.zero_()


def _times(extent: tuple[int, int], factor: int) -> tuple[int, int]:
    return extent[0] * factor, extent[1] * factor


def _moved(extent: tuple[int, int], offset: int) -> tuple[int, int]:
    return extent[0] + offset, extent[1] + offset

"""QLoRA: frozen 4-bit weights of the language model with bitsandbytes (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from ..errors import UserError
from .chat_model import ChatModel

_FIELD = "spec.lora.quantize"
_DECODER = "model.language_model.layers."


def check_quantization(device: torch.device) -> None:
    """Raises UserError, before a model is loaded, when 4-bit weights are not available here."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "QuantizeNotPossible",
            "found nf4, but this image has no bitsandbytes; use one built with EXTRAS=qlora "
            "(pip install 'internvl-trainer[qlora]'), or leave quantize out",
            _FIELD,
        )
    if device.type != "cuda":
        raise UserError(
            "QuantizeNotPossible",
            f"found nf4 on {device.type}; weights in 4 bits need a GPU, set gpusPerWorker or leave quantize out",
            _FIELD,
        )


def quantize_filled(model: ChatModel, name: str, device: torch.device) -> None:
    """Quantize the decoder's linear layer that `name`, a native parameter, completes; other parameters stay.

    Called for each parameter while a model is loaded, so that the layers never exist together in their full size, and
    before adapters are added, so that PEFT chooses its 4-bit layers. Embeddings, norms, the head, the projector and
    the vision tower do not change. A layer computes in the dtype that its weights had.
    """
    from bitsandbytes.nn import Linear4bit  # type: ignore[import-not-found]  # an extra

    layer, _, _ = name.rpartition(".")
    module = model.native.get_submodule(layer)
    if layer.startswith(_DECODER) and type(module) is nn.Linear and not _lacks_values(module):
        owner, _, leaf = layer.rpartition(".")
        setattr(model.native.get_submodule(owner), leaf, _quantized(module, Linear4bit, device))
        model.native.is_loaded_in_4bit = True  # PEFT reads this to choose its 4-bit layers


def _lacks_values(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _quantized(linear: nn.Linear, make: type[nn.Module], device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Params4bit

    layer = make(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = Params4bit(
        linear.weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    layer.bias = linear.bias
    return layer.to(device)  # moving quantizes

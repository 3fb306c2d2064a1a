"""A whole model in 4 bits, as loading leaves it parameter by parameter."""

import torch
from internvl_trainer.model.chat_model import ChatModel
from internvl_trainer.model.quantize import quantize_filled


def quantize_language_model(model: ChatModel, device: torch.device) -> None:
    for name, _ in list(model.native.named_parameters()):
        quantize_filled(model, name, device)

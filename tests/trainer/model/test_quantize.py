"""Weights in 4 bits: refused where they cannot be, and, where bitsandbytes is installed, as PEFT expects them."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest
import torch
from golden import load
from internvl_trainer.errors import UserError
from internvl_trainer.model import quantize
from internvl_trainer.model.adapter_files import adapter_state_dict
from internvl_trainer.model.adapters import Freeze, LoraSettings, apply_method, is_adapter, lora_layers
from internvl_trainer.model.quantize import check_quantization
from quantized import quantize_language_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "installed", "message"),
    [
        pytest.param(
            GPU,
            False,
            "spec.lora.quantize: found nf4, but this image has no bitsandbytes; use one built with EXTRAS=qlora "
            "(pip install 'internvl-trainer[qlora]'), or leave quantize out",
            id="no bitsandbytes",
        ),
        pytest.param(
            CPU,
            True,
            "spec.lora.quantize: found nf4 on cpu; weights in 4 bits need a GPU, set gpusPerWorker or leave quantize "
            "out",
            id="no GPU",
        ),
    ],
)
def test_where_it_cannot_be(
    device: torch.device, installed: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ModuleSpec("bitsandbytes", None) if installed else None
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError) as caught:
        check_quantization(device)
    assert (caught.value.reason, str(caught.value)) == ("QuantizeNotPossible", message)


def test_with_both_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    check_quantization(GPU)


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes (extra qlora) is not installed"
)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["internlm2", "phi3"])
def test_adapters_learn_over_weights_in_4_bits(kind: str) -> None:
    """bitsandbytes computes on processors too, slowly, which is enough to see the parts fit."""
    plain = load(kind, dtype=torch.bfloat16).model
    model = load(kind, dtype=torch.bfloat16).model
    quantize_language_model(model, CPU)
    reports = [
        apply_method(each, "lora", freeze=Freeze(True, True, True), lora=LoraSettings(4, dropout=0.0))
        for each in (plain, model)
    ]
    assert reports[0] == reports[1], "counted as the weights they stand for"
    packed = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    assert packed == {f"native.{name}.base_layer.weight" for name, _ in lora_layers(model)}
    model.set_gradient_checkpointing(True)
    ids = torch.arange(3, 40)[None]
    output = model.train().to(torch.bfloat16)(ids, labels=ids)
    output.loss_sum.backward()
    wanted = plain(ids, labels=ids).loss_sum
    torch.testing.assert_close(output.loss_sum, wanted, rtol=0.02, atol=0)
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(is_adapter(name) and parameter.grad is not None for name, parameter in learning.items())
    assert any(parameter.grad.any() for parameter in learning.values() if parameter.grad is not None)
    assert adapter_state_dict(model).keys() == adapter_state_dict(plain).keys()

"""A step waits for the device twice: a stand-in for a device counts what would make the host wait.

It reads the losses before the update, and the norm of the gradients after it. DeepSpeed's own waits are not seen here.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from golden import CASES, load, sample
from internvl_trainer.data.loader import Batch, Collation, MicroBatch, Window
from internvl_trainer.train import engine as engine_module
from internvl_trainer.train.engine import apply_step, run_backward
from internvl_trainer.train.step_losses import StepLosses
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from trainer.runs import make_config

pytestmark = pytest.mark.slow

READS = ("cpu", "tolist", "numpy")  # of a tensor on the device; other operators have names of their own
COPIES = {"tensor", "as_tensor", "asarray", "new_tensor"}  # of Python's numbers, and the copy to a device waits
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave"}


class OnDevice(torch.Tensor):
    """A tensor on the stand-in for a device; everything that is computed of it is there too, until it is read."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if getattr(func, "__name__", "") in READS:
            Waits.reads += 1
            return result.as_subclass(torch.Tensor) if isinstance(result, torch.Tensor) else result
        return result


class Waits(TorchDispatchMode):
    """Counts operators whose result the host has to see, also in the backward pass, and reads of `OnDevice`."""

    reads = 0

    def __enter__(self) -> Waits:
        Waits.reads, self.operators = 0, []
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        if name in WAITS or masks:
            self.operators.append(name)
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Lists the calls that make a tensor of Python's numbers on a device."""

    def __enter__(self) -> Copies:
        self.calls: list[str] = []
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(func, "__name__", ""), kwargs or {}
        beside = isinstance(args[0], OnDevice) if name == "new_tensor" else False
        if name in COPIES and (beside or options.get("device") is not None):
            self.calls.append(name)
        return func(*args, **options)


class Engine:
    """What a step asks of DeepSpeed's engine."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.optimizer = model, torch.optim.AdamW(model.parameters(), fused=True)
        self.norm: torch.Tensor | None = None

    def __call__(self, **batch: Any) -> Any:
        output = self.model(**batch)
        for name in ("loss_sum", "token_losses"):  # HeadLoss is an autograd function, behind which a subclass is lost
            setattr(output, name, getattr(output, name).as_subclass(OnDevice))
        return output

    def backward(self, loss: torch.Tensor, **_: Any) -> None:
        loss.backward()

    def step(self) -> None:
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(gradients).as_subclass(OnDevice)

    def get_global_grad_norm(self) -> torch.Tensor | None:
        return self.norm


class Alone:
    """A group of one rank."""

    rank, world_size, device = 0, 1, torch.device("cpu")


def window(case: str, image_token_id: int, weighting: Any = "token") -> Window:
    rows = [sample(case, number, compat="default") for number in range(6)]
    for number, row in enumerate(rows):
        row.source = number % 2
    collation = Collation(image_token_id, weighting, sources=True)
    batches = [collation(part) for part in (rows[:2], rows[2:4], rows[4:], rows[1:2])]
    made = [batch for batch in batches if isinstance(batch, MicroBatch)]
    assert len(made) == len(batches)
    return Window(
        batches=[batch.tensors for batch in made], weights=[batch.weight for batch in made],
        supervised_tokens=1, rows=6, tokens=1, places=1, waited=0.0,
    )  # fmt: skip


def place(batch: Batch, device: torch.device) -> Batch:
    """`on_device`, for the stand-in."""
    return {
        name: tensor if name in engine_module.HOST_TENSORS else tensor.as_subclass(OnDevice)
        for name, tensor in batch.items()
    }


def step(case: str, drop: tuple[str, ...] = (), weighting: Any = "token") -> tuple[int, list[str]]:
    """Reads from the device, and what else waits, of one optimizer step of four micro-batches."""
    loaded = load(case.split("/")[0])
    loaded.model.train().set_gradient_checkpointing(True)
    made = window(case, loaded.model.native.config.image_token_id, weighting)
    for batch in made.batches:
        for name in drop:
            del batch[name]
    losses = StepLosses(["a", "b"])
    engine, group = Engine(loaded.model), cast(Any, Alone())
    with Waits() as waits, Copies() as copies:
        run_backward(engine, made, made.weights, make_config("/out"), group, 0, losses, lambda: False)
        before = Waits.reads
        total, _ = losses.read()
        assert apply_step(engine, 1e-4) > 0
    assert before == 0
    assert total > 0
    return Waits.reads, waits.operators + copies.calls


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "on_device", place)


NORM = ["_local_scalar_dense"]


@pytest.mark.parametrize("case", [pytest.param(case, id=case) for case in CASES])
def test_a_step_reads_its_losses_and_the_norm(case: str) -> None:
    assert step(case) == (1, NORM)


def test_weights_and_losses_of_datasets_need_no_other_read() -> None:
    assert step("qwen2/Hermes-2", weighting="square") == (1, NORM)


@pytest.mark.parametrize("name", ["supervised", "image_places"])
def test_the_stand_in_sees_what_waits(name: str) -> None:
    """Without the indices of the collator, the model has to find them."""
    _, operators = step("qwen2/Hermes-2", drop=(name,))
    assert operators == ["nonzero"] * 4 + NORM


def test_the_stand_in_sees_reads() -> None:
    with Waits() as waits:
        tensor = torch.ones(3).as_subclass(OnDevice)
        (2 * tensor).tolist()
        (tensor + 1).cpu()
        float(tensor.sum())
        _ = tensor[tensor > 0]
    assert Waits.reads == 2
    assert waits.operators == ["_local_scalar_dense", "index"]


def test_the_stand_in_sees_copies_of_numbers() -> None:
    device = torch.device("cpu")
    with Copies() as copies:
        torch.tensor(1.0, device=device)
        torch.as_tensor([1.0], device=device)
        torch.ones(3).as_subclass(OnDevice).new_tensor([1.0])
        torch.tensor([1.0]).to(device, non_blocking=True)
        torch.full((), 1.0, device=device)
        torch.ones(3).as_subclass(OnDevice).new_zeros(3)
    assert copies.calls == ["tensor", "as_tensor", "new_tensor"]

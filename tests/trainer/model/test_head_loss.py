"""The loss in chunks: equal to that of all logits at once, and never with all logits in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from closeness import GRADIENTS, assert_close, assert_each_close
from golden import load, sample
from internvl_api.memory.activations import LOGIT_BYTES, LOSS_CHUNK_BYTES, positions_per_chunk
from internvl_trainer.data.collate import collate
from internvl_trainer.model.adapters import Freeze, LoraSettings, apply_method
from internvl_trainer.model.chat_model import ChatModel
from internvl_trainer.model.head_loss import HeadLoss
from internvl_trainer.model.vocabulary import grow_rows
from peft import LoraConfig, inject_adapter_in_model
from quantized import quantize_language_model
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

POSITIONS, HIDDEN, VOCABULARY = 23, 16, 61
EXACT = 1e-6
CHUNKS = [pytest.param(count, id=f"chunks of {count}") for count in (1, 5, POSITIONS, 100)]


def in_chunks(positions: int) -> HeadLoss:
    loss = HeadLoss(VOCABULARY)
    loss.positions = positions
    return loss


def batch(positions: int = POSITIONS, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Hidden states, targets and weights."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(VOCABULARY, (positions,), generator=generator), torch.rand(positions).add(0.5)


def plain_head(bias: bool = False) -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(HIDDEN, VOCABULARY, bias=bias)


def adapted_head() -> nn.Module:
    """The head of a model, with a LoRA of which both matrices have gradients."""
    torch.manual_seed(1)
    model = nn.ModuleDict({"lm_head": plain_head()})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), model)
    return model["lm_head"]


def frozen_head() -> nn.Module:
    return plain_head().requires_grad_(False)


def gradients(head: nn.Module, hidden: torch.Tensor, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss times what the rest of a step makes of it."""
    learning = {name: each for name, each in head.named_parameters() if each.requires_grad}
    found = torch.autograd.grad(loss * 0.37, [hidden, *learning.values()])
    return dict(zip(["hidden", *learning], found, strict=True))


def at_once(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    losses = functional.cross_entropy(head(hidden).float(), targets, reduction="none")
    return (losses * weights).sum(), losses


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    "make",
    [plain_head, lambda: plain_head(bias=True), adapted_head, frozen_head],
    ids=["plain", "bias", "lora", "frozen"],
)
def test_losses_and_gradients_are_those_of_all_logits(make: Any, chunk: int) -> None:
    head, given = make(), batch()
    total, losses = in_chunks(chunk).compute(head, *given)
    wanted_total, wanted_losses = at_once(head, *given)
    assert_close(total, wanted_total, EXACT)
    assert_close(losses, wanted_losses, EXACT)
    assert not losses.requires_grad
    found, wanted = gradients(head, given[0], total), gradients(head, given[0], wanted_total)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_close(found[name], wanted[name], EXACT, name=name)


def test_dropout_in_the_head_is_drawn_once() -> None:
    head = nn.Sequential(nn.Dropout(0.5), plain_head())
    given = batch()
    torch.manual_seed(2)
    total, _ = in_chunks(POSITIONS).compute(head, *given)
    torch.manual_seed(2)
    wanted, _ = at_once(head, *given)
    assert torch.equal(total, wanted)
    assert_close(gradients(head, given[0], total)["hidden"], gradients(head, given[0], wanted)["hidden"], EXACT)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_chunks_lose_no_digits_in_bf16(autocast: bool) -> None:
    """The head's gradient is a sum over all positions. In bf16 it would stop growing."""
    positions = 2048
    head = plain_head() if autocast else plain_head().bfloat16()
    hidden, targets, weights = batch(positions, torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        total, _ = in_chunks(8).compute(head, hidden, targets, weights)
    found = gradients(head, hidden, total)
    double = plain_head()
    double.load_state_dict({name: each.float() for name, each in head.state_dict().items()})
    exact_hidden = hidden.detach().float().requires_grad_()
    wanted = gradients(double, exact_hidden, at_once(double, exact_hidden, targets, weights)[0])
    assert total.dtype == torch.float32
    assert found["weight"].dtype == head.weight.dtype
    for name in wanted:
        assert_close(found[name].float(), wanted[name], 0.01, name=name)


def test_no_supervised_position_gives_zeros() -> None:
    """ZeRO waits for a gradient of each parameter on every rank."""
    head, (hidden, *others) = plain_head(), batch(0)
    total, losses = in_chunks(5).compute(head, hidden, *others)
    assert (total.item(), losses.shape) == (0.0, (0,))
    assert not gradients(head, hidden, total)["weight"].any()


def test_without_gradients_none_are_taken() -> None:
    head, given = plain_head(), batch()
    with torch.no_grad(), Largest() as seen:
        total, _ = in_chunks(5).compute(head, *given)
    assert not total.requires_grad
    assert seen.elements == 5 * VOCABULARY
    assert not any("backward" in name for name in seen.operations)


class Largest(TorchDispatchMode):
    """The largest tensor with a dimension of the vocabulary that operations make, in elements; views make nothing."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.vocabulary, self.elements = vocabulary, 0
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        self.operations.add(str(func))
        for tensor in tensors(made):
            if self.vocabulary in tensor.shape and tensor.untyped_storage()._cdata not in given:
                self.elements = max(self.elements, tensor.numel())
        return made


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("learns", [True, False], ids=["full", "lora"])
def test_the_longest_rows_never_have_all_their_logits(learns: bool) -> None:
    """InternVL3-8B with four rows of 16,384 supervised tokens, on the meta device: shapes without data."""
    positions, hidden_size, vocabulary = 4 * 16_384, 3_584, 151_674
    chunk = positions_per_chunk(vocabulary)
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.device("meta"):
        head = nn.Linear(hidden_size, vocabulary, bias=False, dtype=torch.bfloat16).requires_grad_(learns)
        hidden = torch.empty(positions, hidden_size, dtype=torch.bfloat16, requires_grad=True)
        targets, weights = torch.empty(positions, dtype=torch.long), torch.empty(positions)
    seen = Largest(vocabulary)
    with seen, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        HeadLoss(vocabulary).compute(head, hidden, targets, weights)[0].backward()
    assert hidden.grad is not None
    assert (head.weight.grad is not None) is learns
    assert seen.elements == max(chunk * vocabulary, vocabulary * hidden_size if learns else 0)
    assert max(saved) <= max(seen.elements, hidden.numel(), head.weight.numel()) < positions * vocabulary / 10


@pytest.mark.parametrize("vocabulary", [32_000, 92_553, 151_674, 10**9])
def test_a_chunk_fills_its_budget(vocabulary: int) -> None:
    bytes_each, count = LOGIT_BYTES * vocabulary, positions_per_chunk(vocabulary)
    assert count >= 1
    assert count == 1 or count * bytes_each <= LOSS_CHUNK_BYTES < (count + 1) * bytes_each


@pytest.fixture
def model() -> ChatModel:
    return load("internlm2").model.train()


def test_a_models_step_never_has_all_its_logits(model: ChatModel) -> None:
    rows = collate([sample("internlm2/internlm2-chat", row) for row in (1, 3)])
    vocabulary, tokens = model.native.lm_head.out_features, int((rows["labels"][:, 1:] != -100).sum())
    wanted = model(**rows)
    wanted.loss_sum.backward()
    whole = {name: each.grad for name, each in model.named_parameters()}
    model.zero_grad()
    model.head_loss.positions = 3
    model.native.lm_head.requires_grad_(False)  # whose gradient has the vocabulary too
    model.language_model.get_input_embeddings().requires_grad_(False)
    with Largest(vocabulary) as seen:
        found = model(**rows)
        found.loss_sum.backward()
    assert seen.elements == 3 * vocabulary < tokens * vocabulary
    assert_close(found.loss_sum, wanted.loss_sum, EXACT)
    chunks = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    assert_each_close(chunks, {name: whole[name] for name in chunks}, GRADIENTS)


def tied(model: ChatModel) -> None:
    """One matrix for both ends of the vocabulary, as small Qwen2 models have: its gradient comes from both."""
    model.native.lm_head.weight = model.language_model.get_input_embeddings().weight


def grown(model: ChatModel) -> None:
    """Seven rows more than the checkpoint, as `model.resizeEmbeddings` adds them."""
    for matrix in (model.native.lm_head, model.language_model.get_input_embeddings()):
        matrix.weight = nn.Parameter(grow_rows(matrix.weight.detach(), len(matrix.weight) + 7))
    model.native.lm_head.out_features += 7


def in_4_bits(model: ChatModel) -> None:
    """QLoRA: the layers in 4 bits, the ends of the vocabulary as they were, an adapter that learns."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes (extra qlora) is not installed")
    quantize_language_model(model, torch.device("cpu"))
    apply_method(model, "lora", freeze=Freeze(True, True, True), lora=LoraSettings(4, dropout=0.0))


@pytest.mark.parametrize("change", [tied, grown, in_4_bits])
def test_vocabularies_and_weights_of_every_kind_have_the_same_gradients(
    model: ChatModel, change: Callable[[ChatModel], None]
) -> None:
    change(model)
    rows = collate([sample("internlm2/internlm2-chat", row) for row in (1, 3)])
    found = []
    for positions in (10_000, 3):
        model.zero_grad()
        model.head_loss.positions = positions
        loss = model(**rows).loss_sum
        loss.backward()
        learned = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        found.append((loss.detach(), learned))
    (whole, all_gradients), (chunked, chunk_gradients) = found
    assert_close(chunked, whole, EXACT)
    assert chunk_gradients.keys() == all_gradients.keys() != set()
    assert_each_close(chunk_gradients, all_gradients, GRADIENTS)

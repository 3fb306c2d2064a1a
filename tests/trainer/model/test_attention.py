"""Attention over flat batches: what it computes, what memory it takes, and which implementation is chosen."""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from closeness import LOSS, assert_close
from golden import load
from internvl_trainer.data.collate import collate
from internvl_trainer.data.sample import Sample
from internvl_trainer.model import attention
from internvl_trainer.model.attention import (
    FLASH_ATTN,
    SDPA,
    VARLEN,
    Rows,
    attend_each_row,
    choose_attention,
    kernel_error,
)
from internvl_trainer.model.rotary import constant_up_to
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")


class LargestSquare(TorchDispatchMode):
    """Counts tensors of `least` or more by `least` or more tokens, as a dense attention mask or its scores are."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.count = least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.ndim >= 2 and min(each.shape[-2:]) >= self.least:
                self.count += 1
        return result


def text(length: int) -> Sample:
    ids = np.random.default_rng(length).integers(5, 200, length)
    return Sample(ids, ids.copy(), np.zeros((1, 3, 56, 56), np.uint8), np.zeros(1, np.int64))


@pytest.mark.parametrize("kind", ["qwen2", "internlm2", "phi3"])
def test_a_pack_of_over_2048_tokens_makes_no_dense_mask(kind: str) -> None:
    """The weights of these models are at most a few hundred wide."""
    batch = collate([text(length) for length in (900, 700, 600)])
    counts = {}
    for name in (SDPA, "sdpa"):
        model = load(kind, attn_implementation=name).model.train()
        with LargestSquare(2048) as squares:
            model(**batch).loss_sum.backward()
        counts[name] = squares.count
    assert counts[SDPA] == 0
    assert counts["sdpa"] > 0, "without it, transformers makes one, and the counter sees it"


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, window: int | None) -> torch.Tensor:
    """Block-diagonal attention by its definition, in fp64."""
    number = torch.repeat_interleave(torch.arange(len(rows.lengths)), torch.tensor(rows.lengths))
    places = torch.arange(len(number))
    behind = places[:, None] - places
    seen = (number[:, None] == number) & (behind >= 0) & (behind < (window or len(number)))
    heads = query.shape[1] // key.shape[1]
    keys, values = (each.double().repeat_interleave(heads, dim=1).transpose(0, 1) for each in (key, value))
    scores = query.double().transpose(0, 1) @ keys.transpose(1, 2) / query.shape[-1] ** 0.5
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 4, 7, 100])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_rows_attend_to_themselves_alone(window: int | None, key_heads: int) -> None:
    torch.manual_seed(0)
    rows = Rows.of(torch.tensor([0, 1, 8, 20], dtype=torch.int32), CPU)
    assert (rows.lengths, rows.longest) == ((1, 7, 12), 12)
    query, key, value = (torch.randn(20, heads, 8) for heads in (4, key_heads, key_heads))
    found = attend_each_row(query, key, value, rows, None, window)
    assert_close(found, dense(query, key, value, rows, window))


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The warnings of a process that has given none so far."""
    monkeypatch.setattr(attention, "_warned", set())
    caplog.set_level(logging.WARNING, attention.logger.name)
    return caplog


def test_a_sliding_windows_mask_over_8192_tokens_is_warned_of_once(warnings: pytest.LogCaptureFixture) -> None:
    assert attention.window_mask(9000, None, CPU) is None
    assert attention.window_mask(9000, 9000, CPU) is None
    assert attention.window_mask(100, 10, CPU) is not None
    assert not warnings.messages
    for length in (8200, 8201):  # another layer, another row
        attention.window_mask(length, 10, CPU)
    (message,) = warnings.messages
    assert "a row of 8200 tokens with a sliding window of 10 needs a dense mask of 64 MiB a layer" in message


@torch.no_grad()
def test_a_padded_batchs_mask_over_8192_tokens_is_warned_of_once(
    warnings: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MOST_MASKED", 1024)
    model = load("qwen2").model.eval()

    def answer(length: int, padded: int) -> None:
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, :padded] = 0
        model.generate(torch.full((2, length), 7), attention_mask=mask, max_new_tokens=2, pad_token_id=0)

    answer(1024, padded=100)
    answer(1200, padded=0)
    assert not warnings.messages, "short enough, and without padding there is no mask"
    answer(1100, padded=100)
    answer(1200, padded=100)
    (message,) = [message for message in warnings.messages if "dense mask" in message]
    assert "a padded (or sliding-window) batch of 2 x 1100 tokens needs a dense mask of 2 MiB a pass" in message


def test_the_kernels_get_what_they_are_documented_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's and flash-attn's kernels have no CPU version; here stands one with their signature."""
    calls: list[dict[str, Any]] = []

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int, **options: Any,
    ) -> torch.Tensor:  # fmt: skip
        calls.append(options)
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert type(max_q) is type(max_k) is int
        left, right = options["window_size"]
        assert right == 0, "causal"
        rows = Rows.of(cu_q, CPU)
        assert rows.longest == max_q == max_k
        scale = options.get("scale", options.get("softmax_scale"))
        return attend_each_row(query, key, value, rows, scale, None if left == -1 else left + 1)

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    batch = collate([text(length) for length in (30, 5, 12)])
    with torch.no_grad():
        expected = load("qwen2", attn_implementation=SDPA).model.eval()(**batch).loss_sum
        for name in (VARLEN, FLASH_ATTN):
            assert_close(load("qwen2", attn_implementation=name).model.eval()(**batch).loss_sum, expected, LOSS)
    torch_calls, package_calls = (list(part) for part in (calls[: len(calls) // 2], calls[len(calls) // 2 :]))
    assert all(each["enable_gqa"] for each in torch_calls)
    assert all(each["causal"] for each in package_calls)
    rows = Rows.of(torch.tensor([0, 9, 12], dtype=torch.int32), CPU)
    query = torch.randn(12, 2, 8)
    for name in (VARLEN, FLASH_ATTN):
        found = attention.KERNELS[name](query, query, query, rows, None, 3)
        assert_close(found, dense(query, query, query, rows, 3))


def test_attention_dropout_is_refused() -> None:
    model = load("qwen2").model.train()
    for layer in model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout 0\.1"):
        model(**collate([text(5)]))


# --- the choice ---


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The kernels that the choice tries, on the CPU instead of a GPU."""
    stand_ins: dict[str, Any] = {}
    monkeypatch.setattr(attention, "KERNELS", stand_ins)
    monkeypatch.setattr(attention, "kernel_error", lambda kernel, _device: kernel_error(kernel, CPU))
    return stand_ins


def _missing(*_: Any) -> torch.Tensor:
    raise ImportError("flash_attn")


def _other_gpu(*_: Any) -> torch.Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def _wrong(query: torch.Tensor, *others: Any) -> torch.Tensor:
    return attend_each_row(query, *others) * 1.2


def _not_finite(query: torch.Tensor, *others: Any) -> torch.Tensor:
    return attend_each_row(query, *others) * float("nan")


@pytest.mark.parametrize(
    ("flash", "varlen", "chosen", "warning"),
    [
        pytest.param(attend_each_row, attend_each_row, FLASH_ATTN, None, id="the extra is installed"),
        pytest.param(_missing, attend_each_row, VARLEN, None, id="without the extra"),
        pytest.param(_other_gpu, attend_each_row, VARLEN, "only supports Ampere", id="built for another GPU"),
        pytest.param(_wrong, attend_each_row, VARLEN, "differs from fp64 by", id="computes something else"),
        pytest.param(_missing, _not_finite, SDPA, "differs from fp64 by nan", id="gives NaN"),
        pytest.param(_missing, _other_gpu, SDPA, "rows_varlen does not work here", id="an old GPU"),
    ],
)
def test_a_tiny_call_decides(
    kernels: dict[str, Any], flash: Any, varlen: Any, chosen: str, warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    kernels |= {FLASH_ATTN: flash, VARLEN: varlen}
    with caplog.at_level(logging.WARNING):
        assert choose_attention(torch.device("cuda")) == chosen
    assert (warning in caplog.text) if warning else not caplog.messages


def test_a_machine_without_a_gpu_takes_the_one_that_runs_anywhere() -> None:
    assert choose_attention(CPU) == SDPA


def test_weights_in_fp32_take_the_one_that_has_fp32(kernels: dict[str, Any]) -> None:
    """The other kernels refuse fp32."""
    kernels |= {FLASH_ATTN: attend_each_row, VARLEN: attend_each_row}
    assert choose_attention(torch.device("cuda"), torch.float32) == SDPA


# --- dynamic rotary embeddings ---


@torch.no_grad()
def test_a_dynamic_rotary_embedding_still_grows_with_longer_rows() -> None:
    """As transformers has it, before, during and after a row that is longer than the original training's rows."""
    ours, theirs = (load("internlm2", attn_implementation=name).model.eval() for name in (SDPA, "sdpa"))
    rotary = ours.language_model.rotary_emb
    assert "dynamic" in rotary.rope_type
    original = rotary.original_max_seq_len
    for length in (20, original + 9, 20):
        batch = collate([text(length)])
        expected = theirs(batch["input_ids"], labels=batch["labels"]).loss_sum
        assert_close(ours(**batch).loss_sum, expected, LOSS)
        assert "dynamic" in rotary.rope_type


@torch.no_grad()
@pytest.mark.parametrize("kind", ["internlm2", "phi3"])
def test_the_loss_of_a_row_does_not_depend_on_longer_rows(kind: str) -> None:
    """Neither beside it nor before it. Above its limit, each kind has other frequencies."""
    limit = constant_up_to(load(kind).model.native.config.text_config)
    assert limit is not None
    rows = [text(length) for length in (50, limit + 300, limit, limit + 1, 70)]
    alone = [load(kind).model.eval()(**collate([row])).token_losses for row in rows]
    model = load(kind).model.eval()
    for _ in range(2):
        packed = model(**collate(rows)).token_losses
        assert_close(packed, torch.cat(alone), LOSS)
        for row, expected in zip(rows, alone, strict=True):
            assert_close(model(**collate([row])).token_losses, expected, LOSS)


@torch.no_grad()
def test_longer_rows_have_other_frequencies() -> None:
    """So that the test above shows something: transformers' own choice makes a short row's loss another."""
    for kind in ("internlm2", "phi3"):
        limit = constant_up_to(load(kind).model.native.config.text_config)
        assert limit is not None
        row = collate([text(50)])
        padding = torch.zeros(2, limit + 300, dtype=torch.int64)
        padding[0, :50] = row["input_ids"][0]
        mask = torch.zeros_like(padding, dtype=torch.bool)
        mask[0, :50] = mask[1] = True
        model = load(kind).model.eval()
        beside = model(padding, attention_mask=mask, return_logits=True).logits[0, :50]
        alone = model(**row, return_logits=True).logits[0]
        assert (beside - alone).abs().max() > 1e-4

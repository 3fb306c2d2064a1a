"""What a card computes, against fp64, upstream and itself; `make bench-gpu` measures how fast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu.exactness import measure_golden, measure_kernels, measure_zero
from internvl_trainer.model.attention import SDPA, choose_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CARD = torch.device("cuda", 0)
BF16 = 2e-2  # of the largest value: five units in the last of bf16's eight bits
BF16_LOSS = 2e-3  # four times the largest on a processor; attention at 1.5 times its scale makes 2.6e-3


def test_a_kernel_without_dense_masks_is_chosen_on_ampere_and_later() -> None:
    if torch.cuda.get_device_capability(CARD) < (8, 0):
        pytest.skip("needs compute capability 8.0")
    assert choose_attention(CARD) != SDPA


def test_attention_is_that_of_fp64() -> None:
    figures = measure_kernels(CARD)
    chosen = [value for name, value in figures.items() if name.startswith((choose_attention(CARD), SDPA))]
    assert len(chosen) >= 4
    assert all(isinstance(value, float) and value < BF16 for value in chosen), figures


def test_upstreams_losses() -> None:
    exact, rounded = measure_golden(CARD, torch.float32), measure_golden(CARD)
    assert max(exact.values()) < 1e-4, exact
    assert max(rounded.values()) < BF16_LOSS, rounded


def test_zero_stages_in_one_process_and_in_two_are_equal(tmp_path: Path) -> None:
    figures = measure_zero(CARD, tmp_path)
    assert len(figures) == 6
    assert max(figures.values()) < 1e-4, figures

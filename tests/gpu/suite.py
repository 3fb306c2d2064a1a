"""The parts of the suite: what each measures, and how many seconds it may take on one card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu.answers import measure_answers
from gpu.card import matmul_flops
from gpu.exactness import measure_golden, measure_kernels, measure_zero
from gpu.steps import Figures, Work, measure_checkpoint, measure_steps
from gpu.upstream import measure_against_upstream
from internvl_trainer.distributed import Group, Rendezvous, join_group
from internvl_trainer.model.attention import choose_attention

SMALL, LARGE = "InternVL3-2B", "InternVL3-8B"
WORKS = {
    "2b-lora": Work(SMALL),
    "2b-full": Work(SMALL, "full"),
    "2b-upstream": Work(SMALL, steps=3),
    "checkpoint": Work("InternVL3-1B", "full"),
    "8b-lora": Work(LARGE, steps=4),
    "8b-qlora": Work(LARGE, quantize=True, steps=4),
    "8b-full": Work(LARGE, "full", layers=8, steps=4),
}
"""Settings of the parts that train."""


@dataclass(frozen=True)
class Part:
    """One part, in a process of its own.

    Attributes:
        limit: seconds after which it is stopped.
    """

    title: str
    limit: int
    measure: Callable[[], Any]


def _device() -> torch.device:
    return torch.device("cuda", 0)


def _alone() -> Group:
    """This process as the only rank, connected as in a run."""
    return join_group(Rendezvous.from_environment({}), "cuda")


def _card() -> Figures:
    return {
        "attention chosen": choose_attention(_device()),
        "matrix product, TFLOP a second": matmul_flops(_device()) / 1e12,
    }


def _golden() -> dict[str, float]:
    return {
        f"{case}, {str(dtype).removeprefix('torch.')}": error
        for dtype in (torch.float32, torch.bfloat16)
        for case, error in measure_golden(_device(), dtype).items()
    }


def _zero() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="zero-") as folder:
        return measure_zero(_device(), Path(folder))


def _steps(name: str) -> Callable[[], Figures]:
    return lambda: measure_steps(WORKS[name], _alone())


PARTS: dict[str, Part] = {
    "card": Part("The card", 60, _card),
    "kernels": Part(
        "Attention in bf16 against fp64: largest error of results and gradients",
        60,
        lambda: measure_kernels(_device()),
    ),
    "golden": Part("Upstream's losses: largest relative difference of a row", 120, _golden),
    "zero": Part("ZeRO in fp32: largest relative difference of a loss from ZeRO-1 in one process", 200, _zero),
    "2b-lora": Part("2B, LoRA", 140, _steps("2b-lora")),
    "2b-full": Part("2B, the language model and the projector learn", 160, _steps("2b-full")),
    "2b-upstream": Part(
        "2B, LoRA, beside upstream's way", 140, lambda: measure_against_upstream(WORKS["2b-upstream"], _device())
    ),
    "2b-answers": Part("2B, answers", 110, lambda: measure_answers(SMALL, _device())),
    "checkpoint": Part(
        "1B, the language model and the projector learn: a checkpoint",
        140,
        lambda: measure_checkpoint(WORKS["checkpoint"], _alone()),
    ),
    "8b-lora": Part("8B, LoRA", 160, _steps("8b-lora")),
    "8b-qlora": Part("8B, QLoRA", 200, _steps("8b-qlora")),
    "8b-full": Part(
        "8B with 8 of its 28 language layers, which learn, and the projector",
        160,
        _steps("8b-full"),
    ),
    "8b-answers": Part("8B, answers", 140, lambda: measure_answers(LARGE, _device())),
}

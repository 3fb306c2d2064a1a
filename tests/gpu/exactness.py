"""Compare a device's results: kernels with fp64, golden losses with upstream's, ZeRO's stages with each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from golden import CASES, RESULTS, ROWS, load, sample
from internvl_trainer.data.collate import collate
from internvl_trainer.model.attention import KERNELS, kernel_error
from internvl_trainer.train.engine import on_device
from trainer.two_ranks import run_on_ranks

LENGTHS = (1, 130, 700, 1217)
HEADS = {"2B": (12, 2), "8B": (28, 4)}  # of queries and keys, in InternVL3; each 128 wide
WINDOWS = (None, 512)
ZERO_WORKER = Path(__file__).with_name("zero_worker.py")


def measure_kernels(device: torch.device, lengths: Sequence[int] = LENGTHS) -> dict[str, float | str]:
    """The largest error of each attention kernel in bf16, as a share of the largest value, or why it does not run."""
    figures: dict[str, float | str] = {}
    for name, kernel in KERNELS.items():
        for size, heads in HEADS.items():
            for window in WINDOWS:
                key = f"{name}, heads of {size}" + (f", window of {window}" if window else "")
                try:
                    figures[key] = kernel_error(kernel, device, lengths=lengths, heads=heads, size=128, window=window)
                except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its finding
                    figures[key] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return figures


@torch.no_grad()
def measure_golden(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, cases: Sequence[str] = CASES
) -> dict[str, float]:
    """The largest difference of a row's loss from upstream's in fp32, as a share of it, for each golden case."""
    figures = {}
    for case in cases:
        model = load(case.split("/")[0], dtype=dtype, device=device).model.eval()
        worst = 0.0
        for row in range(len(ROWS)):
            expected = RESULTS[case]["samples"][row]["loss"]
            if expected is None:
                continue
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # else fp32 has 10 bits in convolutions
                output = model(**on_device(collate([sample(case, row)]), device))
            worst = max(worst, abs(float(output.loss_sum / output.tokens) - expected) / expected)
        figures[case] = worst
    return figures


def measure_zero(
    device: torch.device, folder: Path, *, stages: Sequence[int] = (1, 2, 3), worlds: Sequence[int] = (1, 2)
) -> dict[str, float]:
    """The largest difference of a loss in three steps from ZeRO-1 in one process, as a share of it, in fp32."""
    losses = {}
    for ranks in worlds:
        output = run_on_ranks(ranks, ZERO_WORKER, folder, [device.type, *map(str, stages)])
        for stage in stages:
            path = output / f"losses-{ranks}-{stage}.json"
            losses[ranks, stage] = json.loads(path.read_text(encoding="utf-8"))
    reference = losses[worlds[0], stages[0]]
    assert reference[-1] < reference[0], f"the loss does not fall: {reference}"
    return {
        f"ZeRO-{stage}, {ranks} process{'es' if ranks > 1 else ''}": max(
            abs(one - other) / other for one, other in zip(found, reference, strict=True)
        )
        for (ranks, stage), found in losses.items()
    }

"""What a step tells the metrics and the status: its figures, the memory in use, the rank that others waited for."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

import torch

from internvl_trainer.metrics import Reporter
from internvl_trainer.train.metrics_log import StepRecord


def report_step(reporter: Reporter, record: StepRecord, left: float, device: torch.device) -> None:
    """Set the metrics and the progress of a step that was taken; `left`: seconds that the rest of training takes."""
    reporter.loss.set(record.loss)
    reporter.dataset_losses.set(record.dataset_losses or {})
    reporter.learning_rate.set(record.learning_rate)
    reporter.gradient_norm.set(record.gradient_norm)
    reporter.step.set(record.step)
    reporter.samples.inc(record.samples)
    reporter.packing_efficiency.set(record.tokens / record.places)
    reporter.data_wait.inc(record.data_wait_seconds)
    reporter.step_seconds.observe(record.step_seconds)
    reporter.note_memory(peak_gpu_memory(device))
    reporter.samples_per_second.set(record.samples_per_second)
    reporter.tokens_per_second.set(record.tokens_per_second)
    reporter.update(
        step=record.step,
        epoch=record.epoch,
        loss=record.loss,
        learning_rate=record.learning_rate,
        samples_per_second=round(record.samples_per_second, 3),
        tokens_per_second=round(record.tokens_per_second, 3),
        eta_seconds=round(left, 1),
    )


def straggler(waits: Sequence[float], step_seconds: float) -> int | None:
    """The rank that the others waited for, or None: its data came later than the median by over a tenth of the step.

    `waits`: seconds that each rank waited for its data.
    """
    slowest = max(range(len(waits)), key=waits.__getitem__)
    return slowest if waits[slowest] - median_low(waits) > step_seconds / 10 else None


def peak_gpu_memory(device: torch.device) -> int | None:
    """Bytes that torch's allocator reserved on a GPU at most; None on the CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def device_name(device: torch.device) -> str:
    """The name of a GPU, else CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"

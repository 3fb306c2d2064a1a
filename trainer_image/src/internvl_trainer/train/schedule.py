"""Learning rate as a function of the step, equal to transformers' schedules."""

from __future__ import annotations

import math
from typing import Literal

from internvl_api.spec import Training


def warmup_steps(training: Training, total_steps: int) -> int:
    """Steps of the warm-up: warmupSteps, else warmupRatio of all steps, rounded up."""
    given = training.warmup_steps
    return math.ceil(total_steps * training.warmup_ratio) if given is None else given


def learning_rate(
    step: int, total_steps: int, peak: float, warmup: int, schedule: Literal["cosine", "linear", "constant"]
) -> float:
    """Rate of optimizer step `step` (from 0), as get_cosine_schedule_with_warmup and its siblings give it.

    The warm-up takes `warmup` steps and starts at 0.
    """
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    match schedule:
        case "cosine":
            return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
        case "linear":
            return peak * max(0.0, 1.0 - done)
        case "constant":
            return peak

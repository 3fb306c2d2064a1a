"""Learning rate as a function of the step, equal to transformers' schedules."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int, total_steps: int, peak: float, warmup_ratio: float, schedule: Literal["cosine", "linear", "constant"]
) -> float:
    """Rate of optimizer step `step` (from 0), as get_cosine_schedule_with_warmup and its siblings give it.

    The warm-up takes ceil(total_steps x warmup_ratio) steps and starts at 0.
    """
    warmup = math.ceil(total_steps * warmup_ratio)
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

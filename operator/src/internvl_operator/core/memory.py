"""Will it fit? A warning before anything is started; it never stops a run, as an estimate may be wrong."""

from collections.abc import Sequence
from datetime import datetime

from internvl_api.memory.advice import advice
from internvl_api.memory.estimate import Verdict, estimate
from internvl_api.status import Condition

from internvl_operator.core.conditions import set_condition
from internvl_operator.core.run import Run
from internvl_operator.core.timestamps import to_text

_REASONS: dict[Verdict, str] = {"fits": "Fits", "tight": "Tight", "does not fit": "DoesNotFit"}


def with_estimate(
    conditions: Sequence[Condition], run: Run, gpu_memory: int | None, now: datetime
) -> Sequence[Condition]:
    """`conditions` with a fresh MemoryEstimate; without one where nothing can be said.

    That is: GPUs of unknown memory, a run on CPUs, a model outside the catalogue, or a spec that cannot be run.
    """
    new = _condition(run, gpu_memory, now)
    if new is None:
        return [condition for condition in conditions if condition.type != "MemoryEstimate"]
    return set_condition(conditions, new)


def _condition(run: Run, gpu_memory: int | None, now: datetime) -> Condition | None:
    run_config = run.resolved.run_config
    if gpu_memory is None or run_config is None or run_config.device != "cuda":
        return None
    found = estimate(run_config, gpu_memory)
    if found is None:
        return None
    return Condition(
        type="MemoryEstimate",
        status="False" if found.verdict == "does not fit" else "True",
        reason=_REASONS[found.verdict],
        message=advice(found),
        last_transition_time=to_text(now),
        observed_generation=run.generation,
    )

"""The head of the report: when, how long, on what, and what would make the next run faster."""

from __future__ import annotations

import os
from datetime import timedelta

from internvl_api.constants import ENV_USAGE
from internvl_api.status import Usage
from pydantic import ValidationError

from internvl_trainer.report.record import Record
from internvl_trainer.report.words import duration, moment

MUCH_WAITING = 0.1
"""The share of a step's time spent waiting for data from which the report advises to change something."""

_FEWEST_STEPS = 5  # a share of fewer steps says little
_LONGEST_NAME = 80  # characters of a device's name


def head_facts(record: Record) -> list[tuple[str, str, str]]:
    """(name, value, note) of date, total time and hardware."""
    found = []
    ends = [stage for stage in record.stages if stage.finished is not None]
    if ends and (finished := ends[-1].finished):
        name = "Finished" if ends[-1] is record.stages[-1] else "So far"
        day, time = moment(finished).split()
        found.append((name, day, f"{time} UTC, end of {ends[-1].name}"))
    if len(ends) > 1:
        total = sum((stage.took for stage in ends if stage.took), timedelta())
        found.append(("Total time", duration(total), f"from the end of {ends[0].name} to the end of {ends[-1].name}"))
    return [*found, _hardware(record), *_usage(os.environ.get(ENV_USAGE))]


def data_wait(record: Record) -> float | None:
    """The share of the time in steps spent waiting for data; None with too few steps to tell.

    The first step of an attempt starts the data workers, and is left out.
    """
    firsts = {attempt.first_step for attempt in record.attempts}
    rows = [row for row in record.steps if row["step"] not in firsts and "data_wait_seconds" in row]
    seconds = sum(row["step_seconds"] for row in rows)
    if len(rows) < _FEWEST_STEPS or seconds <= 0:
        return None
    return float(sum(row["data_wait_seconds"] for row in rows) / seconds)


def data_advice(record: Record) -> str | None:
    """What to raise when steps waited for data for a considerable share of their time."""
    share = data_wait(record)
    if share is None or round(share, 3) <= MUCH_WAITING:
        return None
    workers = record.config.training.data_workers
    return (
        f"Steps waited for data {share:.0%} of their time (expected at most {MUCH_WAITING:.0%}). Raise "
        f"training.dataWorkers (now {workers}) as far as the CPUs of a worker allow; if that does not help, bring the "
        "data nearer, or store smaller pictures."
    )


def _usage(told: str | None) -> list[tuple[str, str, str]]:
    """GPU-hours and cost as the operator counts them; nothing outside of a cluster or without GPUs."""
    try:
        usage = Usage.model_validate_json(told) if told else None
    except ValidationError:
        return []
    if usage is None:
        return []
    cost = "" if usage.cost is None else f"cost {usage.cost:.2f} {usage.currency or ''}".rstrip()
    return [("GPU-hours", f"{usage.gpu_hours:.2f}", cost or "of all stages and attempts")]


def _hardware(record: Record) -> tuple[str, str, str]:
    config, attempts = record.config, record.attempts
    count = attempts[-1].processes if attempts else config.workers * config.processes_per_worker
    is_cpu = config.device == "cpu"
    device = record.trained.extra.get("device") if record.trained else None
    known = device[:_LONGEST_NAME] if isinstance(device, str) and device else "CPU" if is_cpu else "GPU"
    workers = f"{config.workers} worker" + ("s" if config.workers > 1 else "")
    if is_cpu:
        return "Hardware", known, f"{count} process" + ("es" if count > 1 else "") + f", {workers} asked for"
    return "Hardware", f"{count} × {known}", f"{workers} asked for"

"""Count the GPUs of this machine, and refuse a run that wants more."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from internvl_api.run_config import RunConfig

from internvl_trainer.doctor.driver import nvml
from internvl_trainer.errors import UserError

ENV_VISIBLE = "CUDA_VISIBLE_DEVICES"


def count_gpus(library: Any = None, environment: Mapping[str, str] = os.environ) -> int:
    """Number of GPUs that a process of this machine may use; 0 without a driver. Imports no torch, which takes seconds.

    Args:
        library: pynvml, or what has its functions.
    """
    library = library or nvml()
    try:
        library.nvmlInit()
    except library.NVMLError:
        return 0
    try:
        present = int(library.nvmlDeviceGetCount())
    except library.NVMLError:  # "GPU is lost" and the like
        return 0
    finally:
        library.nvmlShutdown()
    return present if ENV_VISIBLE not in environment else _visible(environment[ENV_VISIBLE], present)


def _visible(chosen: str, present: int) -> int:
    """Number of GPUs that CUDA_VISIBLE_DEVICES leaves; as in CUDA, the list ends at an entry that names none."""
    count = 0
    for entry in (part.strip() for part in chosen.split(",")):
        named = entry.startswith(("GPU-", "MIG-")) or (entry.isdigit() and int(entry) < present)
        if not named:
            break
        count += 1
    return count if present else 0


def check_gpus(
    config: RunConfig, processes: int, *, asked: bool, tasks: int = 1, count: Callable[[], int] = count_gpus
) -> None:
    """Raises UserError when this machine has fewer GPUs than the run has processes here; a run on the CPU passes.

    Args:
        asked: whether --nproc chose `processes`, and not the recipe.
        tasks: that start as many processes each.
    """
    if config.device != "cuda" or (found := count()) >= processes:
        return
    wants = f"--nproc wants {processes}" if asked else f"the {'recipe' if config.recipe else 'run'} wants {processes}"
    on_cpu = "--device cpu --nproc 1 to rehearse it on the processor"
    fitting = largest_fitting(config, found, tasks)
    choice = f"--nproc {fitting}, which keeps the global batch, or {on_cpu}" if fitting else on_cpu
    instead = "" if fitting else "--nproc N on a machine with N GPUs, or "
    limited = f" ({ENV_VISIBLE} is {os.environ[ENV_VISIBLE]!r})" if os.environ.get(ENV_VISIBLE) else ""
    raise UserError(
        "NotEnoughGpus", f"found {found} GPU{'' if found == 1 else 's'}{limited}, {wants}: use {instead}{choice}"
    )


def largest_fitting(config: RunConfig, most: int, tasks: int = 1) -> int:
    """The largest number of processes a task, at most `most`, that divides the global batch; 0 when there is none.

    Without training there is no batch to divide.
    """
    if not config.trains:
        return most
    training = config.training
    passes, rest = divmod(training.global_batch_size, training.micro_batch_size * tasks)
    if rest:
        return 0
    return next((count for count in range(min(most, passes), 0, -1) if passes % count == 0), 0)

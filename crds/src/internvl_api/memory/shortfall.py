"""Requests and limits of a spec that are below what its stages need, as text for warnings: they stop nothing."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from internvl_api.memory.quantity import GIB, amount, gib
from internvl_api.memory.requests import Needs, needs
from internvl_api.memory.stop_time import LONGEST_GRACE_SECONDS, estimated_stop
from internvl_api.pipeline import PARALLEL_STAGES, stage_names
from internvl_api.run_config import RunConfig
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.pods import stage_field
from internvl_api.status import StageName

_TOLERATED = 0.9  # of an estimate
_DISK = "ephemeral-storage"


def shortfalls(spec: InternVLFineTuneSpec, config: RunConfig, storage_rate: float | None = None) -> list[str]:
    """One sentence for each amount that is too small, with the sum that says why; empty when all suffice.

    Args:
        storage_rate: bytes that a node stores in a second; None before the run has measured it.
    """
    least = spec.min_workers or config.workers  # fewer workers hold and store more each
    smallest = config if least >= config.workers else config.model_copy(update={"workers": least})
    found = dict.fromkeys(
        text
        for stage in stage_names(spec)
        if (needed := needs(smallest, stage)) is not None
        for text in _of_stage(spec, stage, needed)
    )
    every = [*found, *_grace(spec, smallest, storage_rate)]
    return (
        every if smallest is config else [f"{text} (at the fewest workers, spec.minWorkers {least})" for text in every]
    )


def _grace(spec: InternVLFineTuneSpec, config: RunConfig, storage_rate: float | None) -> Iterator[str]:
    """A grace period in which a worker cannot save a checkpoint: each stop loses the steps since the last one."""
    given, estimated = spec.pod_template.termination_grace_period_seconds, estimated_stop(config, storage_rate)
    if estimated is None:
        return
    seconds, why = estimated
    field, needed = "spec.podTemplate.terminationGracePeriodSeconds", "a stop that saves a checkpoint takes about"
    if seconds * _TOLERATED > LONGEST_GRACE_SECONDS:
        yield (
            f"{field}: {needed} {seconds} s, and the longest grace period is {LONGEST_GRACE_SECONDS} s, so that a stop "
            f"loses the steps since the last checkpoint: {why}; use more workers or faster storage for spec.output"
        )
    elif given is not None and given < seconds * _TOLERATED:
        yield f"{field}: found {given}, {needed} {seconds} s: {why}; remove the field, or raise it"


def _of_stage(spec: InternVLFineTuneSpec, stage: StageName, needed: Needs) -> Iterator[str]:
    template = spec.pod_template
    own = template.stage_resources.of(stage)
    parallel = stage in PARALLEL_STAGES
    given = template.resources if own is None and parallel else own
    place = "resources" if own is None else f"stageResources.{stage_field(stage)}"
    for name, wanted, parts in (
        ("cpu", needed.cores / 2, {}),  # slower with less; half is what every process has for itself
        ("memory", needed.memory_bytes * _TOLERATED, needed.memory),
        (_DISK, needed.disk_bytes * _TOLERATED, needed.disk),
    ):
        text = f"about {math.ceil(needed.cores)} cores" if name == "cpu" else _sum(parts)
        for kind, quantity in _amounts(given or {}, name).items():
            if amount(quantity) < wanted:
                yield f"spec.podTemplate.{place}.{kind}.{name}: found {quantity}, {stage} needs {text}"
                break  # a limit ends what exceeds it, a request only chooses the node
    if stage == "train" and template.shm_size is not None and amount(template.shm_size) < needed.shm * _TOLERATED:
        yield (
            f"spec.podTemplate.shmSize: found {template.shm_size}, the batches that {_data_workers(spec)} data workers "
            f"prepare ahead need up to {gib(needed.shm)}; raise it, or lower spec.training.dataWorkers"
        )


def _data_workers(spec: InternVLFineTuneSpec) -> int:
    """Data workers of all processes of a worker."""
    return spec.processes_per_worker * spec.training.data_workers


def _amounts(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The limit and the request of a resource, where they are given. A limit alone is the request too."""
    found = {kind: (given.get(kind) or {}).get(name) for kind in ("limits", "requests")}
    return {kind: quantity for kind, quantity in found.items() if quantity is not None}


def _sum(parts: Mapping[str, int]) -> str:
    terms = " + ".join(f"{name} {part / GIB:.1f}" for name, part in parts.items())
    return f"about {gib(sum(parts.values()))}: {terms}"

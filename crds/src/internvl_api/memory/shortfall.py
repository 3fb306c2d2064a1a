"""Requests and limits of a spec that are below what its stages need, as text for warnings: they stop nothing."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from internvl_api.memory.quantity import GIB, amount, gib
from internvl_api.memory.requests import Needs, needs
from internvl_api.memory.stop_time import estimated_stop
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
    found = dict.fromkeys(
        text
        for stage in stage_names(spec)
        if (needed := needs(config, stage)) is not None
        for text in _of_stage(spec, stage, needed)
    )
    return [*found, *_grace(spec, config, storage_rate)]


def _grace(spec: InternVLFineTuneSpec, config: RunConfig, storage_rate: float | None) -> Iterator[str]:
    """A grace period in which a worker cannot save a checkpoint: each stop loses the steps since the last one."""
    given, estimated = spec.pod_template.termination_grace_period_seconds, estimated_stop(config, storage_rate)
    if given is not None and estimated is not None and given < estimated[0] * _TOLERATED:
        yield (
            f"spec.podTemplate.terminationGracePeriodSeconds: found {given}, a stop that saves a checkpoint takes "
            f"about {estimated[0]} s: {estimated[1]}; remove the field, or raise it"
        )


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
        kind, quantity = _most(given or {}, name)
        if quantity is not None and amount(quantity) < wanted:
            text = f"about {math.ceil(needed.cores)} cores" if name == "cpu" else _sum(parts)
            yield f"spec.podTemplate.{place}.{kind}.{name}: found {quantity}, {stage} needs {text}"
    if stage == "train" and template.shm_size is not None and amount(template.shm_size) < needed.shm * _TOLERATED:
        yield (
            f"spec.podTemplate.shmSize: found {template.shm_size}, the batches that {_data_workers(spec)} data workers "
            f"prepare ahead need up to {gib(needed.shm)}; raise it, or lower spec.training.dataWorkers"
        )


def _data_workers(spec: InternVLFineTuneSpec) -> int:
    """Data workers of all processes of a worker."""
    return spec.processes_per_worker * spec.training.data_workers


def _most(given: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """(limits or requests, quantity): a limit ends what exceeds it; a request alone only chooses the node."""
    for kind in ("limits", "requests"):
        quantity = (given.get(kind) or {}).get(name)
        if quantity is not None:
            return kind, quantity
    return "requests", None


def _sum(parts: Mapping[str, int]) -> str:
    terms = " + ".join(f"{name} {part / GIB:.1f}" for name, part in parts.items())
    return f"about {gib(sum(parts.values()))}: {terms}"

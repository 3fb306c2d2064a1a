"""Requests and limits that are below what a run's stages need, or cannot be used, as text for warnings.

They stop nothing, as the sums are estimates.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Literal

from internvl_api.constants import SHM_PATH
from internvl_api.memory.disk_shortfall import cache_shortfall, volume_shortfalls
from internvl_api.memory.pod_disk import Bound, StageDisk, is_in_memory, needs_of_node, volume_at, volume_size
from internvl_api.memory.pod_settings import DISK, TOLERATED, Given, PodSettings, given_for
from internvl_api.memory.requests import Needs, needs
from internvl_api.memory.stop_time import LONGEST_GRACE_SECONDS, estimated_stop
from internvl_api.pipeline import stage_names
from internvl_api.quantity import GIB, amount, gib
from internvl_api.run_config import RunConfig
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.status import StageName

_KINDS: tuple[Literal["limits"], Literal["requests"]] = ("limits", "requests")


def shortfalls(
    spec: InternVLFineTuneSpec,
    config: RunConfig,
    storage_rate: float | None = None,
    settings: PodSettings = PodSettings(),  # noqa: B008 - immutable
) -> list[str]:
    """One sentence for each amount that cannot work, with the sum that says why; empty when all suffice.

    Args:
        storage_rate: bytes that a node stores in a second; None before the run has measured it.
        settings: what the operator gives pods where the spec says nothing.
    """
    least = spec.min_workers or config.workers  # fewer workers hold and store more each
    smallest = config if least >= config.workers else config.model_copy(update={"workers": least})
    found: dict[str, None] = {}
    for stage in stage_names(spec):
        found |= dict.fromkeys(_of_stage(spec, stage, needs(smallest, stage), settings))
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
    if seconds * TOLERATED > LONGEST_GRACE_SECONDS:
        yield (
            f"{field}: {needed} {seconds} s, and the longest grace period is {LONGEST_GRACE_SECONDS} s, so that a stop "
            f"loses the steps since the last checkpoint: {why}; use more workers or faster storage for spec.output"
        )
    elif given is not None and given < seconds * TOLERATED:
        yield f"{field}: found {given}, {needed} {seconds} s: {why}; remove the field, or raise it"


def _of_stage(
    spec: InternVLFineTuneSpec, stage: StageName, needed: Needs | None, settings: PodSettings
) -> Iterator[str]:
    given = given_for(spec, stage, settings)
    disk = StageDisk(spec, stage, needed, given, settings)
    of_node = needed and needs_of_node(spec, stage, needed, settings)
    if of_node is not None:
        yield from _too_small(stage, given, of_node)
    yield from volume_shortfalls(disk)
    yield from cache_shortfall(disk)
    if stage == "train":
        yield from _replaced_shm(spec)
        yield from _shm(spec, given, of_node)


def _too_small(stage: StageName, given: Given, needed: Needs) -> Iterator[str]:
    """Requests and limits below what a stage needs of its node."""
    disk = needed.disk
    for name, wanted, parts in (
        ("cpu", needed.cores / 2, {}),  # slower with less; half is what every process has for itself
        ("memory", needed.memory_bytes * TOLERATED, needed.memory),
        (DISK, sum(disk.values()) * TOLERATED, disk),
    ):
        text = f"about {math.ceil(needed.cores)} cores" if name == "cpu" else _sum(parts)
        for kind in _KINDS if given.is_of_spec else _KINDS[:1]:  # a user cannot change the administrator's requests
            quantity = given.amount(kind, name)
            if quantity is not None and amount(quantity) < wanted:
                yield f"{given.place}.{kind}.{name}: found {quantity}, {stage} needs {text}"
                break  # a limit ends what exceeds it, a request only chooses the node


def _replaced_shm(spec: InternVLFineTuneSpec) -> Iterator[str]:
    """A shmSize without effect."""
    size = spec.pod_template.shm_size
    if size and volume_at(spec, SHM_PATH) is not None:
        yield (
            f"spec.podTemplate.shmSize: found {size}, but podTemplate.volumeMounts mounts a volume at {SHM_PATH}, "
            "which replaces the one of this size; remove one of them"
        )


def _shm(spec: InternVLFineTuneSpec, given: Given, needed: Needs | None) -> Iterator[str]:
    """A /dev/shm that is too small for the batches, or larger than the memory that it is a part of."""
    bound = _shm_size(spec)
    if bound is None:
        return
    found = f"{bound.place}: found {bound.limit}"
    if needed is not None and amount(bound.limit) < needed.shm * TOLERATED:
        yield (
            f"{found}, the batches that {_data_workers(spec)} data workers prepare ahead need up to "
            f"{gib(needed.shm)}; raise it, or lower spec.training.dataWorkers"
        )
    volume = volume_at(spec, SHM_PATH)
    if volume is None or is_in_memory(volume):
        yield from _more_than_memory(f"{found}, more than", bound, given, needed)


def _more_than_memory(found: str, bound: Bound, given: Given, needed: Needs | None) -> Iterator[str]:
    """A size of /dev/shm above the memory that it is a part of."""
    shared, lower = "/dev/shm is memory of the worker, so that", f"lower {bound.place.rpartition('.')[2]}"
    size, limit, request = amount(bound.limit), given.amount("limits", "memory"), given.amount("requests", "memory")
    if limit is not None and size > amount(limit):
        yield (
            f"{found} {given.place}.limits.memory {limit}; {shared} no more than the limit can be used; "
            f"{lower}, or raise the limit"
        )
    elif limit is None and request is not None and size > amount(request):
        yield (
            f"{found} {given.place}.requests.memory {request}; {shared} a node may have no room for it; "
            f"{lower}, or raise the request"
        )
    elif given.amounts is None and needed is not None and size > needed.memory_bytes:
        yield (
            f"{found} all memory that a worker requests, {_sum(needed.memory)}; {shared} a node may have no room for "
            f"it; {lower}, or set spec.podTemplate.resources"
        )


def _shm_size(spec: InternVLFineTuneSpec) -> Bound | None:
    """The size of /dev/shm that the spec gives, as shmSize or by a volume; None where it gives none."""
    volume, size = volume_at(spec, SHM_PATH), spec.pod_template.shm_size
    if volume is not None:
        return volume_size(spec, volume)
    return Bound(size, "spec.podTemplate.shmSize") if size else None


def _data_workers(spec: InternVLFineTuneSpec) -> int:
    """Data workers of all processes of a worker."""
    return spec.processes_per_worker * spec.training.data_workers


def _sum(parts: Mapping[str, int]) -> str:
    terms = " + ".join(f"{name} {part / GIB:.1f}" for name, part in parts.items())
    return f"about {gib(sum(parts.values()))}: {terms}"

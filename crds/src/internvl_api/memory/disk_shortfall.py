"""Limits of a pod's disk that are below what its stage puts there, as text for warnings."""

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal

from internvl_api.constants import CACHE_PATH, ENV_CACHE_GIB, SCRATCH_PATH
from internvl_api.memory.pod_settings import DISK, TOLERATED, Given, PodSettings, disk_limit
from internvl_api.memory.quantity import GIB, amount, gib
from internvl_api.memory.requests import Needs
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.status import StageName


def disk_parts(spec: InternVLFineTuneSpec, needed: Needs, settings: PodSettings) -> dict[str, int]:
    """Bytes by purpose on the pod's own disk: not on a volume of the run's, nor in a folder of the node."""
    return {name: size for parts in _volumes(spec, needed, settings).values() for name, size in parts.items() if size}


def volume_shortfalls(
    spec: InternVLFineTuneSpec, stage: StageName, given: Given, needed: Needs, settings: PodSettings
) -> Iterator[str]:
    """/scratch or /cache whose size limit is below what the stage puts there: the kubelet evicts the pod.

    A request that is derived raises the size limits.
    """
    if settings.disk is None or given.amounts is None or given.amount("limits", DISK) is not None:
        return
    limit = disk_limit(given.amounts, settings.disk)
    for path, parts in _volumes(spec, needed, settings).items():
        if sum(parts.values()) * TOLERATED > amount(limit):
            terms = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
            yield (
                f"the operator's setting scratchSizeLimit: found {settings.disk}, {stage} needs about "
                f"{gib(sum(parts.values()))} in {path}: {terms}; set {given.place}.requests.{DISK} "
                "to at least that, or raise scratchSizeLimit"
            )


def cache_shortfall(
    spec: InternVLFineTuneSpec, stage: StageName, given: Given, needed: Needs | None, settings: PodSettings
) -> Iterator[str]:
    """A cache that may grow beyond its disk, by a variable of the run: the kubelet evicts the pod when it does."""
    kept = _cache_bytes(spec)
    if kept is None or settings.is_cache_of_node or _is_mounted(spec, CACHE_PATH):
        return
    limit, place = given.amount("limits", DISK), f"{given.place}.limits.{DISK}"
    parts: Mapping[str, int] = {} if needed is None else disk_parts(spec, needed, settings)
    if limit is None and settings.disk is not None:
        request = given.amount("requests", DISK) or (str(sum(parts.values())) if given.amounts is None else "0")
        limit, place = disk_limit({"requests": {DISK: request}}, settings.disk), "the size limit of /cache"
        parts = {} if needed is None else _volumes(spec, needed, settings)[CACHE_PATH]
    if limit is None or kept + sum(parts.values()) <= amount(limit):
        return
    room = int((amount(limit) - sum(parts.values())) / GIB)
    smaller = f"set it to at most {room}" if room > 0 else "raise that limit"  # the trainer refuses a cache of 0
    yield (
        f"spec.podTemplate.env {ENV_CACHE_GIB}: found {kept / GIB:.1f}, the GiB that {stage} keeps in /cache beside "
        f"{gib(sum(parts.values()))} in use: more than {place} {limit}, so that the pod is evicted when the cache is "
        f"full; remove the variable, or {smaller}"
    )


def _volumes(spec: InternVLFineTuneSpec, needed: Needs, settings: PodSettings) -> dict[str, Mapping[str, int]]:
    """What a stage puts into each of the pod's own folders, by path."""
    own = {SCRATCH_PATH: needed.scratch} if settings.is_cache_of_node else {
        CACHE_PATH: needed.cache, SCRATCH_PATH: needed.scratch
    }  # fmt: skip
    return {path: {} if _is_mounted(spec, path) else parts for path, parts in own.items()}


def _is_mounted(spec: InternVLFineTuneSpec, path: str) -> bool:
    """Whether the run mounts a volume of its own there."""
    return any(mount["mountPath"] == path for mount in spec.pod_template.volume_mounts)


def _cache_bytes(spec: InternVLFineTuneSpec) -> Decimal | None:
    """What the run says that its cache keeps; None where it says nothing, or no amount, which the trainer refuses."""
    values = [item.get("value") or "" for item in spec.pod_template.env if item["name"] == ENV_CACHE_GIB]
    found = values[-1] if values else ""
    return Decimal(found) * GIB if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", found) else None

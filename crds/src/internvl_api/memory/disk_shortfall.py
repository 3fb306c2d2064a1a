"""Sizes of a pod's volumes that are below what its stage puts there, as text for warnings."""

import re
from collections.abc import Iterator
from decimal import Decimal

from internvl_api.constants import ENV_CACHE_GIB
from internvl_api.memory.pod_disk import FILLING_CACHE, SCRATCH_SETTING, StageDisk, volumes
from internvl_api.memory.pod_settings import DISK, TOLERATED
from internvl_api.quantity import GIB, amount, gib
from internvl_api.spec import InternVLFineTuneSpec


def volume_shortfalls(disk: StageDisk) -> Iterator[str]:
    """/scratch or /cache whose size is below what the stage puts there: the kubelet evicts the pod, or it is full."""
    given = disk.given
    for volume in volumes(disk.spec):
        parts = volume.bytes_by_purpose(disk.needed) if disk.needed else {}
        found = disk.bound(volume)
        if found is None or sum(parts.values()) * TOLERATED <= amount(found.limit):
            continue
        terms = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        needs = f"{disk.stage} needs about {gib(sum(parts.values()))} in {' and '.join(volume.paths)}: {terms}"
        text = f"{found.place}: found {found.limit}, {needs}"
        if volume.own is not None:
            yield f"{text}; raise it to at least that"
        elif found.place == SCRATCH_SETTING or not given.is_of_spec:  # the run's request is compared with all its disk
            yield f"{text}; set {given.place}.requests.{DISK} to at least that, or raise {SCRATCH_SETTING}"


def cache_shortfall(disk: StageDisk) -> Iterator[str]:
    """A cache that may grow beyond its volume, by a variable of the run."""
    kept, tightest = _cache_bytes(disk.spec), disk.tightest_of_cache()
    if kept is None or tightest is None or disk.stage not in FILLING_CACHE:
        return
    (limit, place), taken = tightest
    if kept + taken <= amount(limit):
        return
    room = int((amount(limit) - taken) / GIB)
    smaller = f"set it to at most {room}" if room > 0 else "raise that limit"  # the trainer refuses a cache of 0
    yield (
        f"spec.podTemplate.env {ENV_CACHE_GIB}: found {kept / GIB:.1f}, the GiB that {disk.stage} keeps in /cache "
        f"beside {gib(taken)} in use: more than {place} {limit}, so that the volume is full, or the pod evicted, "
        f"before the cache makes room; remove the variable, or {smaller}"
    )


def _cache_bytes(spec: InternVLFineTuneSpec) -> Decimal | None:
    """What the run says that its cache keeps; None where it says nothing, or no amount, which the trainer refuses."""
    values = [item.get("value") or "" for item in spec.pod_template.env if item["name"] == ENV_CACHE_GIB]
    found = values[-1] if values else ""
    return Decimal(found) * GIB if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", found) else None

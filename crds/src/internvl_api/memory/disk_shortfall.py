"""Limits of a pod's disk that are below what its stage puts there, as text for warnings."""

import re
from collections.abc import Iterator
from decimal import Decimal

from internvl_api.constants import ENV_CACHE_GIB
from internvl_api.memory.pod_disk import cache_bounds, folders, placed
from internvl_api.memory.pod_settings import DISK, TOLERATED, Amounts, Given, PodSettings
from internvl_api.memory.quantity import GIB, amount, gib
from internvl_api.memory.requests import Needs, whole_gi
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.status import StageName

_CACHING = ("preflight", "baseline-evaluate", "train", "evaluate", "merge")  # stages that use the cache


def volume_shortfalls(
    spec: InternVLFineTuneSpec, stage: StageName, given: Given, needed: Needs, settings: PodSettings
) -> Iterator[str]:
    """/scratch or /cache whose size is below what the stage puts there: the kubelet evicts the pod, or it is full."""
    amounts = _amounts(spec, given, needed, settings)
    for each in folders(spec):
        found, parts = each.bound(spec, amounts, settings), each.parts(needed)
        if found is None or sum(parts.values()) * TOLERATED <= amount(found.limit):
            continue
        terms = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        paths = " and ".join(each.paths)
        needs = f"found {found.limit}, {stage} needs about {gib(sum(parts.values()))} in {paths}: {terms}"
        if each.volume is not None:
            yield f"{found.place}: {needs}; raise it to at least that"
            continue
        if found.limit != settings.disk and given.is_of_spec:  # the request, which is compared with the sum of both
            continue
        request = f"{given.place}.requests.{DISK}"
        origin = "the operator's setting scratchSizeLimit" if found.limit == settings.disk else request
        yield f"{origin}: {needs}; set {request} to at least that, or raise the operator's setting scratchSizeLimit"


def cache_shortfall(
    spec: InternVLFineTuneSpec, stage: StageName, given: Given, needed: Needs | None, settings: PodSettings
) -> Iterator[str]:
    """A cache that may grow beyond its disk, by a variable of the run: the kubelet evicts the pod when it does."""
    kept = _cache_bytes(spec)
    if kept is None or stage not in _CACHING:
        return
    amounts = _amounts(spec, given, needed, settings)
    for (limit, place), taken in cache_bounds(spec, amounts, given.place, needed, settings):
        if kept + taken <= amount(limit):
            continue
        room = int((amount(limit) - taken) / GIB)
        smaller = f"set it to at most {room}" if room > 0 else "raise that limit"  # the trainer refuses a cache of 0
        yield (
            f"spec.podTemplate.env {ENV_CACHE_GIB}: found {kept / GIB:.1f}, the GiB that {stage} keeps in /cache "
            f"beside {gib(taken)} in use: more than {place} {limit}, so that the pod is evicted when the cache is "
            f"full; remove the variable, or {smaller}"
        )
        return


def _amounts(spec: InternVLFineTuneSpec, given: Given, needed: Needs | None, settings: PodSettings) -> Amounts:
    """What is given, else the request of disk that is derived, which raises the size limits."""
    if given.amounts is not None or needed is None:
        return given.amounts or {}
    return {"requests": {DISK: whole_gi(placed(spec, needed, settings).disk_bytes)}}


def _cache_bytes(spec: InternVLFineTuneSpec) -> Decimal | None:
    """What the run says that its cache keeps; None where it says nothing, or no amount, which the trainer refuses."""
    values = [item.get("value") or "" for item in spec.pod_template.env if item["name"] == ENV_CACHE_GIB]
    found = values[-1] if values else ""
    return Decimal(found) * GIB if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", found) else None

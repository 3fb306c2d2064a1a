"""Which folders of a pod are on its own disk, and the sizes at which the kubelet evicts it."""

from collections.abc import Iterator
from typing import NamedTuple

from internvl_api.constants import CACHE_PATH, SCRATCH_PATH
from internvl_api.memory.pod_settings import DISK, Amounts, PodSettings, disk_limit
from internvl_api.memory.requests import Needs
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.kubernetes.volumes import Volume


class Bound(NamedTuple):
    """A limit, as a quantity, and its place in words: a field of the spec, or the operator's own limit."""

    limit: str
    place: str


def disk_parts(spec: InternVLFineTuneSpec, needed: Needs, settings: PodSettings) -> dict[str, int]:
    """Bytes by purpose that a stage puts on the pod's own disk: not on another volume, nor in a folder of the node."""
    folders = {CACHE_PATH: needed.cache, SCRATCH_PATH: needed.scratch}
    return {
        name: size
        for path, parts in folders.items()
        if _is_on_disk(spec, path, settings)
        for name, size in parts.items()
        if size
    }


def volume_bound(spec: InternVLFineTuneSpec, path: str, given: Amounts, settings: PodSettings) -> Bound | None:
    """The size limit of the volume at /scratch or /cache; None where it has none of its own, or none is known.

    The operator's volumes have none of their own beside a limit of the container's ephemeral-storage.

    Args:
        given: requests and limits of the container.
    """
    volume = _volume_at(spec, path)
    if volume is not None:
        size = (volume.get("emptyDir") or {}).get("sizeLimit")
        place = f"spec.podTemplate.volumes[{spec.pod_template.volumes.index(volume)}].emptyDir.sizeLimit"
        return Bound(str(size), place) if size else None
    if settings.disk is None or _is_of_node(path, settings) or DISK in (given.get("limits") or {}):
        return None
    return Bound(disk_limit(given, settings.disk), f"the size limit of {path}")


def cache_bounds(
    spec: InternVLFineTuneSpec, given: Amounts, place: str, needed: Needs | None, settings: PodSettings
) -> Iterator[tuple[Bound, int]]:
    """What bounds the files in /cache, each with the bytes that the stage itself needs within it, as far as known.

    Args:
        given: requests and limits of the container.
        place: of `given`, for messages.
    """
    limit = (given.get("limits") or {}).get(DISK)
    if limit is not None and _is_on_disk(spec, CACHE_PATH, settings):
        parts = {} if needed is None else disk_parts(spec, needed, settings)
        yield Bound(str(limit), f"{place}.limits.{DISK}"), sum(parts.values())
    if found := volume_bound(spec, CACHE_PATH, given, settings):
        yield found, 0 if needed is None else sum(needed.cache.values())


def _is_on_disk(spec: InternVLFineTuneSpec, path: str, settings: PodSettings) -> bool:
    """Whether Kubernetes counts the files of a folder as the pod's ephemeral-storage."""
    volume = _volume_at(spec, path)
    if volume is None:
        return not _is_of_node(path, settings)
    return "emptyDir" in volume and not (volume["emptyDir"] or {}).get("medium")


def _is_of_node(path: str, settings: PodSettings) -> bool:
    return path == CACHE_PATH and settings.is_cache_of_node


def _volume_at(spec: InternVLFineTuneSpec, path: str) -> Volume | None:
    """The run's own volume at a path; None where the operator's is."""
    template = spec.pod_template
    mounted = [mount["name"] for mount in template.volume_mounts if mount["mountPath"] == path]
    return next((volume for volume in template.volumes if volume["name"] in mounted[-1:]), None)

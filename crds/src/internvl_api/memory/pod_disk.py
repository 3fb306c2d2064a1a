"""Where the files of /cache and /scratch are: on the pod's disk, in memory or elsewhere, and what bounds them there."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from internvl_api.constants import CACHE_PATH, SCRATCH_PATH
from internvl_api.memory.pod_settings import DISK, Amounts, PodSettings, disk_limit
from internvl_api.memory.quantity import amount
from internvl_api.memory.requests import Needs
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.kubernetes.volumes import Volume


class Bound(NamedTuple):
    """A limit, as a quantity, and its place in words: a field of the spec, or the operator's own limit."""

    limit: str
    place: str


class Folders(NamedTuple):
    """/cache, /scratch or both, on one volume; `volume` is None for the operator's own."""

    paths: tuple[str, ...]
    volume: Volume | None

    def parts(self, needed: Needs) -> dict[str, int]:
        """Bytes by purpose that a stage puts there."""
        of_paths = {CACHE_PATH: needed.cache, SCRATCH_PATH: needed.scratch}
        return {name: size for path in self.paths for name, size in of_paths[path].items() if size}

    def is_on_disk(self, settings: PodSettings) -> bool:
        """Whether Kubernetes counts the files as the pod's ephemeral-storage."""
        if self.volume is None:
            return not self._is_of_node(settings)
        return "emptyDir" in self.volume and not is_in_memory(self.volume)

    def bound(self, spec: InternVLFineTuneSpec, given: Amounts, settings: PodSettings) -> Bound | None:
        """The size of the volume; None where it has none, or none is known.

        The operator's volumes have none beside a limit of the container's ephemeral-storage.

        Args:
            given: requests and limits of the container.
        """
        if self.volume is not None:
            return volume_size(spec, self.volume)
        if settings.disk is None or self._is_of_node(settings) or DISK in (given.get("limits") or {}):
            return None
        return Bound(disk_limit(given, settings.disk), f"the size limit of {self.paths[0]}")

    def _is_of_node(self, settings: PodSettings) -> bool:
        return settings.is_cache_of_node and CACHE_PATH in self.paths


def folders(spec: InternVLFineTuneSpec) -> tuple[Folders, ...]:
    """/cache and /scratch, in this order; one, when they share a volume of the run."""
    cache, scratch = volume_at(spec, CACHE_PATH), volume_at(spec, SCRATCH_PATH)
    if cache is not None and cache is scratch:
        return (Folders((CACHE_PATH, SCRATCH_PATH), cache),)
    return (Folders((CACHE_PATH,), cache), Folders((SCRATCH_PATH,), scratch))


def placed(spec: InternVLFineTuneSpec, needed: Needs, settings: PodSettings) -> Needs:
    """What a stage needs of its node: its files on the pod's disk alone, and volumes in memory as memory.

    A volume in memory counts with its whole size, which the cache may fill.
    """
    on_disk = [path for each in folders(spec) if each.is_on_disk(settings) for path in each.paths]
    in_memory = {
        f"files in {' and '.join(each.paths)}": int(amount(size.limit))
        for each in folders(spec)
        if each.volume is not None and is_in_memory(each.volume) and (size := volume_size(spec, each.volume))
    }
    return replace(
        needed,
        memory={**needed.memory, **in_memory},
        cache=needed.cache if CACHE_PATH in on_disk else {},
        scratch=needed.scratch if SCRATCH_PATH in on_disk else {},
    )


def cache_bounds(
    spec: InternVLFineTuneSpec, given: Amounts, place: str, needed: Needs | None, settings: PodSettings
) -> Iterator[tuple[Bound, int]]:
    """What bounds the files in /cache, each with the bytes that the stage itself needs within it, as far as known.

    Args:
        given: requests and limits of the container.
        place: of `given`, for messages.
    """
    cache, limit = folders(spec)[0], (given.get("limits") or {}).get(DISK)
    if limit is not None and cache.is_on_disk(settings):
        taken = 0 if needed is None else placed(spec, needed, settings).disk_bytes
        yield Bound(str(limit), f"{place}.limits.{DISK}"), taken
    if found := cache.bound(spec, given, settings):
        yield found, 0 if needed is None else sum(cache.parts(needed).values())


def volume_at(spec: InternVLFineTuneSpec, path: str) -> Volume | None:
    """The run's own volume at a path; None where it mounts none."""
    template = spec.pod_template
    mounted = [mount["name"] for mount in template.volume_mounts if mount["mountPath"] == path]
    return next((volume for volume in template.volumes if volume["name"] in mounted), None)


def is_in_memory(volume: Volume) -> bool:
    """Whether the volume is an emptyDir whose files are memory of the container."""
    return bool("emptyDir" in volume and volume["emptyDir"].get("medium"))


def volume_size(spec: InternVLFineTuneSpec, volume: Volume) -> Bound | None:
    """The size that a volume of the run is given; None for one of unknown size. Zero is no limit to the kubelet."""
    field, size = f"spec.podTemplate.volumes[{spec.pod_template.volumes.index(volume)}]", None
    if "emptyDir" in volume:
        field, size = f"{field}.emptyDir.sizeLimit", volume["emptyDir"].get("sizeLimit")
    elif "ephemeral" in volume:
        claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
        field = f"{field}.ephemeral.volumeClaimTemplate.spec.resources.requests.storage"
        size = claim.get("resources", {}).get("requests", {}).get("storage")
    return Bound(str(size), field) if size is not None and amount(size) > 0 else None

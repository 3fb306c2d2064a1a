"""Where the files of /cache and /scratch are: on the pod's disk, in memory or elsewhere, and what bounds them there."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from internvl_api.constants import CACHE_PATH, SCRATCH_PATH
from internvl_api.memory.pod_settings import DISK, Amounts, Given, PodSettings, disk_limit
from internvl_api.memory.requests import Needs, whole_gi
from internvl_api.quantity import amount
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.kubernetes.volumes import Volume
from internvl_api.status import StageName

SCRATCH_SETTING = "the operator's setting scratchSizeLimit"
# Stages that read weights or all media, and may fill the cache; others read a few files.
FILLING_CACHE = ("preflight", "baseline-evaluate", "train", "evaluate", "merge")


class Bound(NamedTuple):
    """A limit, as a quantity, and its place in words: a field of the spec, or a setting of the operator."""

    limit: str
    place: str


class TrainerVolume(NamedTuple):
    """The volume at /cache, at /scratch or at both; `own` is the run's, None for the operator's."""

    paths: tuple[str, ...]
    own: Volume | None

    def is_on_disk(self, settings: PodSettings) -> bool:
        """Whether Kubernetes counts its files as the pod's ephemeral-storage."""
        if self.own is None:
            return not self.is_of_node(settings)
        return "emptyDir" in self.own and not is_in_memory(self.own)

    def is_of_node(self, settings: PodSettings) -> bool:
        """Whether it is the administrator's folder of the node."""
        return self.own is None and settings.is_cache_of_node and CACHE_PATH in self.paths

    def bytes_by_purpose(self, needed: Needs) -> dict[str, int]:
        """What a stage puts there."""
        of_paths = {CACHE_PATH: needed.cache, SCRATCH_PATH: needed.scratch}
        return {name: size for path in self.paths for name, size in of_paths[path].items() if size}


@dataclass(frozen=True)
class StageDisk:
    """The volumes at /cache and /scratch of a stage's pods, and what the stage puts there.

    Attributes:
        needed: None for a model outside the catalogue, and on the CPU.
        given: requests and limits of the container.
    """

    spec: InternVLFineTuneSpec
    stage: StageName
    needed: Needs | None
    given: Given
    settings: PodSettings

    def bound(self, volume: TrainerVolume) -> Bound | None:
        """The size of a volume; None where it has none, or none is known.

        The operator's volumes have none beside a limit of the container's ephemeral-storage.
        """
        if volume.own is not None:
            return volume_size(self.spec, volume.own)
        given, setting = self._amounts(), self.settings.disk
        if setting is None or volume.is_of_node(self.settings) or DISK in (given.get("limits") or {}):
            return None
        limit = disk_limit(given, setting)
        if limit == setting:
            return Bound(limit, SCRATCH_SETTING)
        is_derived = self.given.amounts is None
        place = f"the derived size of {volume.paths[0]}," if is_derived else f"{self.given.place}.requests.{DISK}"
        return Bound(limit, place)

    def tightest_of_cache(self) -> tuple[Bound, int] | None:
        """What bounds the files in /cache most, and the bytes that the stage itself needs within it, as far as known.

        None where nothing bounds them.
        """
        return min(self._bounds_of_cache(), key=lambda found: amount(found[0].limit) - found[1], default=None)

    def _bounds_of_cache(self) -> Iterator[tuple[Bound, int]]:
        cache, limit = volumes(self.spec)[0], self.given.amount("limits", DISK)
        if limit is not None and cache.is_on_disk(self.settings):
            taken = needs_of_node(self.spec, self.stage, self.needed, self.settings).disk_bytes if self.needed else 0
            yield Bound(str(limit), f"{self.given.place}.limits.{DISK}"), taken
        if found := self.bound(cache):
            yield found, sum(cache.bytes_by_purpose(self.needed).values()) if self.needed else 0

    def _amounts(self) -> Amounts:
        """What is given, else the request of disk that is derived, which raises the size of the operator's volumes."""
        if self.given.amounts is not None or self.needed is None:
            return self.given.amounts or {}
        disk = needs_of_node(self.spec, self.stage, self.needed, self.settings).disk_bytes
        return {"requests": {DISK: whole_gi(disk)}}


def volumes(spec: InternVLFineTuneSpec) -> tuple[TrainerVolume, ...]:
    """The volumes at /cache and /scratch, in this order; one, when they share a volume of the run."""
    cache, scratch = volume_at(spec, CACHE_PATH), volume_at(spec, SCRATCH_PATH)
    if cache is not None and cache is scratch:
        return (TrainerVolume((CACHE_PATH, SCRATCH_PATH), cache),)
    return (TrainerVolume((CACHE_PATH,), cache), TrainerVolume((SCRATCH_PATH,), scratch))


def needs_of_node(spec: InternVLFineTuneSpec, stage: StageName, needed: Needs, settings: PodSettings) -> Needs:
    """What a stage needs of its node: of its files those on the pod's disk, and those in memory as memory.

    A cache in memory counts with the size of its volume, which it may fill.
    """
    on_disk = [path for each in volumes(spec) if each.is_on_disk(settings) for path in each.paths]
    in_memory: dict[str, int] = {}
    for each in volumes(spec):
        if each.own is not None and is_in_memory(each.own):
            size = volume_size(spec, each.own)
            fills = CACHE_PATH in each.paths and stage in FILLING_CACHE and size is not None
            used = int(amount(size.limit)) if fills and size else sum(each.bytes_by_purpose(needed).values())
            in_memory[f"files in {' and '.join(each.paths)}"] = used
    return replace(
        needed,
        memory={**needed.memory, **{name: size for name, size in in_memory.items() if size}},
        cache=needed.cache if CACHE_PATH in on_disk else {},
        scratch=needed.scratch if SCRATCH_PATH in on_disk else {},
    )


def volume_at(spec: InternVLFineTuneSpec, path: str) -> Volume | None:
    """The run's own volume at a path; None where it mounts none."""
    template = spec.pod_template
    mounted = [mount["name"] for mount in template.volume_mounts if mount["mountPath"] == path]
    return next((volume for volume in template.volumes if volume["name"] in mounted), None)


def is_in_memory(volume: Volume) -> bool:
    """Whether the volume is an emptyDir whose files are memory of the container."""
    return "emptyDir" in volume and volume["emptyDir"].get("medium") == "Memory"


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

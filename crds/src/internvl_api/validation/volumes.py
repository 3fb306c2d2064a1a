"""Rules for the volumes of `spec.podTemplate`: their names, where they are mounted, and what must be kept on one."""

import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from internvl_api.constants import (
    CACHE_PATH,
    CONFIG_FOLDER,
    PVC_ROOT,
    SCRATCH_PATH,
    SHM_PATH,
    TERMINATION_MESSAGE_PATH,
)
from internvl_api.memory.pod_disk import is_in_memory, volume_size
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.kubernetes.container import VolumeMount
from internvl_api.spec.kubernetes.volumes import VOLUME_KINDS, Volume
from internvl_api.validation.violations import Violation

_OWN = re.compile(r"config|scratch|cache|shm|pvc-[0-9]+")  # volumes that the operator adds to every pod, and mounts
_KEPT = (CONFIG_FOLDER, TERMINATION_MESSAGE_PATH, PVC_ROOT)  # mounts of the operator that no run replaces
_WRITTEN = (SCRATCH_PATH, CACHE_PATH, SHM_PATH)  # where the trainer writes
_READ_ONLY = ("configMap", "secret", "projected", "downwardAPI", "image")  # kinds of volume
_OF_POD = ("emptyDir", "ephemeral")  # kinds of volume that end with their pod


def wrong_volumes(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """Volumes that no pod would have, and those where the trainer could not write, or without a bound in memory."""
    volumes, mounts = spec.pod_template.volumes, spec.pod_template.volume_mounts
    names = [volume["name"] for volume in volumes]
    for index, (name, volume) in enumerate(zip(names, volumes, strict=True)):
        field = f"spec.podTemplate.volumes[{index}]"
        if name in names[:index]:
            yield Violation(f"{field}.name", f"found {name!r} twice; give each volume a name of its own")
        elif _OWN.fullmatch(name):
            text = f"found {name!r}, a volume that the operator adds to every pod and that would hide this one"
            rename = f"rename it here and in volumeMounts, for example to 'my-{name}'"
            yield Violation(f"{field}.name", f"{text}; {rename}")
        paths = [each["mountPath"] for each in mounts if each["name"] == name and each["mountPath"] in _WRITTEN]
        if paths:
            yield from _written_volume(spec, field, volume, paths)


def wrong_mounts(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """Mounts of no volume, at paths of another mount, and read-only ones where the trainer writes."""
    names = [volume["name"] for volume in spec.pod_template.volumes]
    paths = [mount["mountPath"] for mount in spec.pod_template.volume_mounts]
    for index, mount in enumerate(spec.pod_template.volume_mounts):
        field, name, path = f"spec.podTemplate.volumeMounts[{index}]", mount["name"], mount["mountPath"]
        if text := _wrong_path(path, paths[:index]):
            yield Violation(f"{field}.mountPath", text)
        if name not in names:
            known = f"expected a volume of podTemplate.volumes: {', '.join(names) or 'none'}"
            own = ", a volume that the operator mounts itself" if _OWN.fullmatch(name) else ""
            yield Violation(f"{field}.name", f"found {name!r}{own}, {known}")
        if mount.get("readOnly") and path in _WRITTEN:
            yield Violation(f"{field}.readOnly", f"found true, but the trainer writes to {path}; remove it")


def lost_with_pod(spec: InternVLFineTuneSpec, field: str, place: str) -> Iterator[Violation]:
    """A violation for a path whose files end with their pod, as each stage has its own pods, or cannot be written."""
    if not place.startswith("/"):
        return
    template = spec.pod_template
    mounts = [each for each in template.volume_mounts if PurePosixPath(place).is_relative_to(each["mountPath"])]
    if not mounts:
        text = (
            f"found {place!r}, where podTemplate.volumeMounts mounts no volume, so results would be lost with "
            "the pod; use object storage such as s3://bucket/prefix, or mount a volume there"
        )
        yield Violation(field, text)
        return
    mount = max(mounts, key=lambda each: len(each["mountPath"]))
    volume = next((each for each in template.volumes if each["name"] == mount["name"]), Volume(name=""))
    of_pod = [f"{kind}, which ends with its pod" for kind in _OF_POD if kind in volume]
    why = of_pod[0] if of_pod else _read_only(mount, volume)
    if why:
        text = f"found {place!r} on the volume {mount['name']!r} ({why})"
        yield Violation(field, f"{text}; use object storage such as s3://bucket/prefix, or a persistentVolumeClaim")


def _wrong_path(path: str, earlier: Sequence[str]) -> str | None:
    plain = posixpath.normpath("/" + path.replace(":", "-").lstrip("/"))
    for kept in map(PurePosixPath, _KEPT):
        if PurePosixPath(plain).is_relative_to(kept) or kept.is_relative_to(plain):
            return f"found {path!r}, which would hide {kept}; mount the volume elsewhere"
    if path != plain:
        return f"found {path!r}, expected an absolute path in its shortest form, without ':', such as {plain!r}"
    return f"found {path!r} twice; give each mount a path of its own" if path in earlier else None


def _written_volume(
    spec: InternVLFineTuneSpec, field: str, volume: Volume, paths: Sequence[str]
) -> Iterator[Violation]:
    """Violations of a volume that is mounted where the trainer writes."""
    place, medium = " and ".join(paths), volume.get("emptyDir", {}).get("medium", "")
    if found := _read_only_kind(volume):
        kind, text = found
        yield Violation(
            f"{field}.{kind}", f"found a volume that is read-only ({text}), but the trainer writes to {place}"
        )
    if medium not in ("", "Memory"):
        yield Violation(f"{field}.emptyDir.medium", f"found {medium!r}, expected Memory or none for {place}")
    if is_in_memory(volume) and volume_size(spec, volume) is None and paths != [SHM_PATH]:
        text = f"required: files in {place} use the container's memory; set the most that they may use, such as 64Gi"
        yield Violation(f"{field}.emptyDir.sizeLimit", text)


def _read_only(mount: VolumeMount, volume: Volume) -> str | None:
    """Why the container cannot write; None when it can, as far as the spec says."""
    if mount.get("readOnly"):
        return "mounted with readOnly true"
    found = _read_only_kind(volume)
    return found[1] if found else None


def _read_only_kind(volume: Volume) -> tuple[str, str] | None:
    """The kind of a volume that nobody can write to, and why."""
    kinds: dict[str, Any] = {kind: value for kind, value in volume.items() if kind in VOLUME_KINDS}
    for kind, value in kinds.items():
        if kind in _READ_ONLY:
            return kind, f"{kind} always is"
        if value.get("readOnly"):
            return kind, f"{kind} with readOnly true"
    return None

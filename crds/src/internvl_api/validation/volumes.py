"""Rules for the volumes of `spec.podTemplate`: their names, where they are mounted, and what must be kept on one."""

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from internvl_api.constants import CACHE_PATH, CONFIG_FOLDER, SCRATCH_PATH, SHM_PATH
from internvl_api.memory.pod_disk import is_in_memory
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.kubernetes.container import VolumeMount
from internvl_api.spec.kubernetes.volumes import VOLUME_KINDS, Volume
from internvl_api.validation.violations import Violation

_OWN = ("config", "scratch", "cache", "shm")  # volumes that the operator adds to every pod
_OF_CLAIM = re.compile(r"pvc-[0-9]+")  # the operator's, for the claims of pvc:// sources
_WRITTEN = (SCRATCH_PATH, CACHE_PATH, SHM_PATH)  # where the trainer writes
_READ_ONLY = ("configMap", "secret", "projected", "downwardAPI", "image")  # kinds of volume
_OF_POD = ("emptyDir", "ephemeral")  # kinds of volume that end with their pod


def wrong_volumes(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """Volumes that no pod would have, and memory without a bound."""
    volumes, mounts = spec.pod_template.volumes, spec.pod_template.volume_mounts
    names = [volume["name"] for volume in volumes]
    for index, (name, volume) in enumerate(zip(names, volumes, strict=True)):
        field = f"spec.podTemplate.volumes[{index}]"
        if name in names[:index]:
            yield Violation(f"{field}.name", f"found {name!r} twice; give each volume a name of its own")
        elif name in _OWN or _OF_CLAIM.fullmatch(name):
            text = f"found {name!r}, a volume that the operator adds to every pod and that would hide this one"
            rename = f"rename it here and in volumeMounts, for example to 'my-{name}'"
            yield Violation(f"{field}.name", f"{text}; {rename}")
        paths = [each["mountPath"] for each in mounts if each["name"] == name]
        for path in (CACHE_PATH, SCRATCH_PATH):
            if path in paths and is_in_memory(volume) and not volume["emptyDir"].get("sizeLimit"):
                text = f"required, because its files at {path} are memory of the container; set what may be in memory"
                yield Violation(f"{field}.emptyDir.sizeLimit", text)
                break


def wrong_mounts(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """Mounts of no volume, at paths of another mount, and without room to write where the trainer writes."""
    volumes = {volume["name"]: volume for volume in spec.pod_template.volumes}
    paths = [mount["mountPath"] for mount in spec.pod_template.volume_mounts]
    for index, mount in enumerate(spec.pod_template.volume_mounts):
        field = f"spec.podTemplate.volumeMounts[{index}]"
        if text := _wrong_path(paths[index], paths[:index]):
            yield Violation(f"{field}.mountPath", text)
        if text := _wrong_volume(mount, volumes):
            yield Violation(f"{field}.name", text)


def not_kept(spec: InternVLFineTuneSpec, field: str, place: str) -> Iterator[Violation]:
    """A violation for a path whose files end with their pod: each stage has its own pods."""
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
    volume = next((each for each in template.volumes if each["name"] == mount["name"]), None)
    kind = "of the operator" if volume is None else next((kind for kind in _OF_POD if kind in volume), None)
    why = f"{kind}, which ends with its pod" if kind else _read_only(mount, volume)
    if why:
        text = f"found {place!r} on the volume {mount['name']!r} ({why})"
        yield Violation(field, f"{text}; use object storage such as s3://bucket/prefix, or a persistentVolumeClaim")


def _wrong_path(path: str, earlier: Sequence[str]) -> str | None:
    plain = posixpath.normpath("/" + path.replace(":", "-").lstrip("/"))
    if path != plain:
        return f"found {path!r}, expected an absolute path in its shortest form, without ':', such as {plain!r}"
    if path == "/" or PurePosixPath(path).is_relative_to(CONFIG_FOLDER):
        return f"found {path!r}, which would hide files that the trainer needs; mount the volume elsewhere"
    return f"found {path!r} twice; give each mount a path of its own" if path in earlier else None


def _wrong_volume(mount: VolumeMount, volumes: Mapping[str, Volume]) -> str | None:
    name, path = mount["name"], mount["mountPath"]
    known = f"expected a volume of podTemplate.volumes: {', '.join(volumes) or 'none'}"
    if name not in volumes and (name not in _OWN or path in _WRITTEN):
        return f"found {name!r}, {known}"
    why = _read_only(mount, volumes.get(name)) if path in _WRITTEN else None
    return (
        f"found {name!r} ({why}), but the trainer writes to {path}; mount a volume that it can write to"
        if why
        else None
    )


def _read_only(mount: VolumeMount, volume: Volume | None) -> str | None:
    """Why the container cannot write; None when it can, as far as the spec says."""
    if mount.get("readOnly"):
        return "mounted with readOnly true"
    kinds: dict[str, Any] = {kind: volume[kind] for kind in VOLUME_KINDS if kind in volume} if volume else {}  # type: ignore[literal-required]
    for kind, value in kinds.items():
        if kind in _READ_ONLY:
            return f"{kind}, which is read-only"
        if value.get("readOnly"):
            return f"{kind} with readOnly true"
    return None

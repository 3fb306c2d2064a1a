"""Rules for `spec.podTemplate` beyond the bounds of its fields.

The API server finds the same mistakes when a pod is made; those in `resources`, which only training workers get, after
the whole preflight.
"""

import posixpath
import re
from collections.abc import Iterable, Iterator

from internvl_api.constants import GPU
from internvl_api.memory.quantity import amount
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.kubernetes.container import Resources
from internvl_api.spec.kubernetes.volumes import VOLUME_KINDS, Volume
from internvl_api.spec.pods import PodTemplate
from internvl_api.validation.cel_rules import Values, rule
from internvl_api.validation.violations import Violation

_OWN_VOLUMES = re.compile(r"config|scratch|cache|shm|pvc-[0-9]+")  # volumes that the operator adds to every pod


# A server drops an unknown kind that a client did not check; Kubernetes takes a volume without a kind for an emptyDir.
@rule(
    "podTemplate.volumes[]",
    f"[{', '.join(f'has(self.{kind})' for kind in VOLUME_KINDS)}].filter(given, given).size() == 1",
    f"found {{count:d}} kinds of volume, expected exactly one of {', '.join(VOLUME_KINDS)}",
    count=f"[{', '.join(f'has(self.{kind})' for kind in VOLUME_KINDS)}].filter(given, given).size()",
)
def one_kind_of_volume(volume: Volume) -> Values | None:
    """A volume has exactly one kind."""
    count = len(volume.keys() & set(VOLUME_KINDS))
    return {"count": count} if count != 1 else None


@rule(
    "podTemplate",
    "!has(self.gpuClaimTemplate) || !has(self.gpuResource)",
    "found '{found}', but gpuResource is set too; remove one: a worker gets its GPUs by a claim or as a resource",
    field="gpuClaimTemplate",
    found="self.gpuClaimTemplate",
)
def gpus_of_one_kind(template: PodTemplate) -> Values | None:
    """A worker's GPUs come by a claim or as a resource."""
    if template.gpu_claim_template is None or template.gpu_resource is None:
        return None
    return {"found": template.gpu_claim_template}


RULES = (one_kind_of_volume, gpus_of_one_kind)


def wrong_pod_template(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """Violations of a podTemplate that no rule of the CRD finds."""
    yield from _volumes(spec)
    yield from _mounts(spec)
    yield from _resources(spec)


def _volumes(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """Volumes that no pod would have; an emptyDir's loss is none, as the operator's own volume is as empty."""
    names = [volume["name"] for volume in spec.pod_template.volumes]
    for index, (name, volume) in enumerate(zip(names, spec.pod_template.volumes, strict=True)):
        field = f"spec.podTemplate.volumes[{index}].name"
        if name in names[:index]:
            yield Violation(field, f"found {name!r} twice; give each volume a name of its own")
        elif _OWN_VOLUMES.fullmatch(name) and "emptyDir" not in volume:
            text = f"found {name!r}, a volume that the operator adds to every pod and that would hide this one"
            yield Violation(field, f"{text}; rename it here and in volumeMounts, for example to 'my-{name}'")


def _mounts(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """Mounts of no volume, and paths that would hide another mount or that the operator would not recognise."""
    names = [volume["name"] for volume in spec.pod_template.volumes]
    paths = [mount["mountPath"] for mount in spec.pod_template.volume_mounts]
    for index, (path, mount) in enumerate(zip(paths, spec.pod_template.volume_mounts, strict=True)):
        plain = posixpath.normpath("/" + path.replace(":", "-").lstrip("/"))
        if path != plain:
            text = f"found {path!r}, expected an absolute path in its shortest form, without ':', such as {plain!r}"
            yield Violation(f"spec.podTemplate.volumeMounts[{index}].mountPath", text)
        elif path in paths[:index]:
            text = f"found {path!r} twice; give each mount a path of its own"
            yield Violation(f"spec.podTemplate.volumeMounts[{index}].mountPath", text)
        if mount["name"] not in names and not _OWN_VOLUMES.fullmatch(mount["name"]):
            text = f"found {mount['name']!r}, expected a volume of podTemplate.volumes: {', '.join(names) or 'none'}"
            yield Violation(f"spec.podTemplate.volumeMounts[{index}].name", text)


def _resources(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    template = spec.pod_template
    no_gpu = "" if spec.gpus_per_worker else "spec.gpusPerWorker is 0; set GPUs there instead"
    names = dict.fromkeys((GPU, template.gpu_resource or GPU))
    if template.gpu_claim_template and no_gpu:
        yield Violation("spec.podTemplate.gpuClaimTemplate", f"found {template.gpu_claim_template!r}, but {no_gpu}")
    yield from _gpus("spec.podTemplate.resources", template.resources, names, no_gpu)
    yield from _above_limit("spec.podTemplate.resources", template.resources)
    for stage in type(template.stage_resources).model_fields:
        why = no_gpu if stage == "evaluate" else "this stage uses no GPU; remove it"
        field, given = f"spec.podTemplate.stageResources.{stage}", template.stage_resources.of(stage)
        yield from _gpus(field, given, names, why)
        yield from _above_limit(field, given)


def _gpus(field: str, given: Resources | None, names: Iterable[str], no_gpu: str) -> Iterator[Violation]:
    resources = given or {}
    for part, amounts in (("limits", resources.get("limits", {})), ("requests", resources.get("requests", {}))):
        for name in names:
            if name in amounts and no_gpu:
                yield Violation(f"{field}.{part}.{name}", f"found {amounts[name]}, but {no_gpu}")


def _above_limit(field: str, given: Resources | None) -> Iterator[Violation]:
    """Requests above their limits. The API server refuses a pod that has one."""
    limits, requests = (given or {}).get("limits", {}), (given or {}).get("requests", {})
    for name in sorted(limits.keys() & requests.keys()):
        if amount(requests[name]) > amount(limits[name]):
            text = f"found {requests[name]} with a limit of {limits[name]}; lower the request, or raise the limit"
            yield Violation(f"{field}.requests.{name}", text)

"""What refuses `spec.podTemplate`, whose parts have Kubernetes' own format and no schema here.

An API server finds the same when the pod is made; of `resources`, which only training workers get, after the whole
preflight. Only what is certainly wrong is refused: a newer Kubernetes may know more fields.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from internvl_api.constants import GPU
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.validation.suggest import did_you_mean
from internvl_api.validation.violations import Violation

_QUANTITY = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?")
_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_KNOWN = {
    "tolerations": ("key", "operator", "value", "effect", "tolerationSeconds"),
    "imagePullSecrets": ("name",),
    "env": ("name", "value", "valueFrom"),
    "resources": ("limits", "requests", "claims"),
}
_ONE_OF = {
    "operator": ("Exists", "Equal", "Lt", "Gt"),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
}
_OWN_VOLUMES = re.compile(r"config|scratch|cache|shm|pvc-[0-9]+")  # volumes that the operator adds to every pod


def wrong_pod_template(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """Violations of a podTemplate that every Kubernetes release refuses."""
    template = spec.pod_template
    for index, item in enumerate(template.env):
        yield from _env(f"spec.podTemplate.env[{index}]", item)
    for index, item in enumerate(template.tolerations):
        yield from _toleration(f"spec.podTemplate.tolerations[{index}]", item)
    for index, item in enumerate(template.image_pull_secrets):
        field = f"spec.podTemplate.imagePullSecrets[{index}]"
        yield from _unknown(field, item, _KNOWN["imagePullSecrets"])
        yield from _text(f"{field}.name", item.get("name"))
    yield from _volumes(spec)
    yield from _resources(spec)


def _env(field: str, item: dict[str, Any]) -> Iterator[Violation]:
    yield from _unknown(field, item, _KNOWN["env"])
    name, value = item.get("name"), item.get("value")
    if not isinstance(name, str) or not _ENV_NAME.fullmatch(name):
        yield Violation(f"{field}.name", f"found {name!r}, expected the name of an environment variable")
    if value is not None and not isinstance(value, str):
        yield Violation(f"{field}.value", f"found {_yaml(value)}, expected text; put it in quotes")


def _toleration(field: str, item: dict[str, Any]) -> Iterator[Violation]:
    yield from _unknown(field, item, _KNOWN["tolerations"])
    for part, known in _ONE_OF.items():
        if (found := item.get(part)) not in (None, "", *known):
            hint = did_you_mean(str(found), known)
            yield Violation(f"{field}.{part}", f"found {found!r}{hint}, expected one of {', '.join(known)}")


def _volumes(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    names = [volume.get("name") for volume in spec.pod_template.volumes]
    for index, name in enumerate(names):
        yield from _text(f"spec.podTemplate.volumes[{index}].name", name)
    for index, mount in enumerate(spec.pod_template.volume_mounts):
        field, name = f"spec.podTemplate.volumeMounts[{index}]", mount.get("name")
        yield from _text(f"{field}.mountPath", mount.get("mountPath"))
        if name not in names and not (isinstance(name, str) and _OWN_VOLUMES.fullmatch(name)):
            have = ", ".join(map(str, names)) or "none"
            text = f"found {name!r}, expected a volume of podTemplate.volumes: {have}"
            yield Violation(f"{field}.name", text)


def _resources(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    template = spec.pod_template
    no_gpu = "" if spec.gpus_per_worker else "spec.gpusPerWorker is 0; set GPUs there instead"
    yield from _amounts("spec.podTemplate.resources", template.resources or {}, no_gpu)
    for stage in type(template.stage_resources).model_fields:
        given, alone = template.stage_resources.of(stage) or {}, stage != "evaluate"
        why = "this stage uses no GPU; remove it" if alone else no_gpu
        yield from _amounts(f"spec.podTemplate.stageResources.{stage}", given, why)


def _amounts(field: str, given: dict[str, Any], no_gpu: str) -> Iterator[Violation]:
    yield from _unknown(field, given, _KNOWN["resources"])
    for part in ("limits", "requests"):
        amounts = given.get(part) or {}
        if not isinstance(amounts, dict):
            yield Violation(f"{field}.{part}", f"found {_yaml(amounts)}, expected an object such as {{cpu: 8}}")
            continue
        for name, amount in amounts.items():
            if isinstance(amount, bool) or not _QUANTITY.fullmatch(str(amount)):
                text = f"found {amount!r}, expected a quantity such as 8, 500m or 64Gi"
                yield Violation(f"{field}.{part}.{name}", text)
        if GPU in amounts and no_gpu:
            yield Violation(f"{field}.{part}.{GPU}", f"found {amounts[GPU]}, but {no_gpu}")


def _unknown(field: str, item: dict[str, Any], known: tuple[str, ...]) -> Iterator[Violation]:
    for name in item:
        if name not in known:
            text = f"unknown field{did_you_mean(str(name), known)}; fields: {', '.join(known)}"
            yield Violation(f"{field}.{name}", text)


def _text(field: str, found: object) -> Iterator[Violation]:
    if not isinstance(found, str) or not found:
        yield Violation(field, f"found {_yaml(found)}, expected text")


def _yaml(value: object) -> str:
    """The value in YAML, for messages."""
    return "nothing" if value is None else json.dumps(value, default=str)

"""Rules for `spec.podTemplate` beyond the bounds of its fields.

The API server finds some of these mistakes when a pod is made; those in `resources`, which only training workers get,
after the whole preflight.
"""

from collections.abc import Iterable, Iterator

from internvl_api.constants import CACHE_PATH, ENV_CACHE, GPU, OPERATOR_ENV
from internvl_api.quantity import amount
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.kubernetes.container import Resources
from internvl_api.spec.kubernetes.volumes import VOLUME_KINDS, Volume
from internvl_api.spec.pods import PodTemplate
from internvl_api.validation.cel_rules import Values, rule
from internvl_api.validation.violations import Violation
from internvl_api.validation.volumes import wrong_mounts, wrong_volumes


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
    yield from wrong_volumes(spec)
    yield from wrong_mounts(spec)
    yield from _env(spec)
    yield from _resources(spec)


def _env(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """Variables that would have no effect, or move the cache away from its volume and the sums of its size."""
    for index, name in enumerate(item["name"] for item in spec.pod_template.env):
        field = f"spec.podTemplate.env[{index}].name"
        if name in OPERATOR_ENV:
            yield Violation(field, f"found {name!r}, which the operator sets in every pod; remove it")
        elif name == ENV_CACHE:
            text = f"found {name!r}; the cache of a pod is {CACHE_PATH}: remove the variable, and mount a volume there"
            yield Violation(field, text)


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

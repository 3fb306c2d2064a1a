"""Build the requests and limits of a worker, from the spec and the operator's defaults."""

from typing import Any

from internvl_api.constants import DEFAULT_CACHE_GIB, GPU
from internvl_api.memory import requests
from internvl_api.memory.pod_disk import StageDisk, needs_of_node
from internvl_api.memory.pod_settings import Amounts, Given, given_for
from internvl_api.quantity import GIB, amount
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.pods import StageResources, stage_field

from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.run import Run
from internvl_operator.core.stages import Stage

GPU_CLAIM = "gpus"  # its name in the pod
_LEAST_CACHE_GIB = 0.1  # the trainer refuses a cache of nothing
# The limits of workers that other stages get too, and the least of each: a worker of a small model may need less than
# the merge of its weights. A worker's other limits (network cards, huge pages, scratch disk) are its own.
_DERIVED = {"cpu": "1", "memory": "4Gi"}


def build(run: Run, stage: Stage, config: OperatorConfig) -> dict[str, Any]:
    """`resources` of the trainer's container. A stage without GPUs never asks for one.

    The spec decides, else a setting that the administrator changed, else what the model needs; for a model that is not
    in the catalogue, and on the CPU, the settings' defaults.
    """
    spec, template = run.spec, run.spec.pod_template
    given = given_for(spec, stage.name).amounts
    resource = template.gpu_resource or config.gpu_resource
    if stage.parallel:
        wanted, claims = _default(run, stage, config) if given is None else given, gpu_claims(spec, stage)
        built = _with_gpus(wanted, resource, 0 if claims else stage.gpus(spec))
        own = [{"name": each["name"]} for each in claims]
        return built | {"claims": [*built.get("claims", []), *own]} if own else built
    if given is not None:
        return _with_gpus(given, resource, 0)
    return _within_limits(_default(run, stage, config), (template.resources or {}).get("limits") or {})


def gpu_claims(spec: InternVLFineTuneSpec, stage: Stage) -> list[dict[str, str]]:
    """The pod's claim of GPUs, where the spec names a template for it and the stage uses GPUs."""
    template = spec.pod_template.gpu_claim_template
    return [{"name": GPU_CLAIM, "resourceClaimTemplateName": template}] if template and stage.gpus(spec) else []


def shm_size(run: Run, stage: Stage) -> str:
    """The size limit of a stage's /dev/shm: the spec's, else what training's batches need."""
    config = run.resolved.run_config
    if run.spec.pod_template.shm_size or config is None or stage.name != "train":
        return run.spec.pod_template.shm_size or requests.whole_gi(requests.DEFAULT_SHM)
    return requests.whole_gi(requests.size_of_shm(config))


def _default(run: Run, stage: Stage, config: OperatorConfig) -> Amounts:
    settings = config.pod_settings
    setting: Amounts = config.worker_resources if stage.parallel else config.stage_resources
    is_changed = (settings.workers if stage.parallel else settings.others) is not None
    if is_changed or run.resolved.run_config is None:
        return setting
    found = requests.needs(run.resolved.run_config, stage.name)
    if found is None:
        return setting
    return {"requests": needs_of_node(run.spec, stage.name, found, settings).requests()}


def cache_gib(run: Run, stage: Stage, config: OperatorConfig) -> float | None:
    """GiB that a pod may keep in its cache beside the files in use, where its disk has a limit; None for the default.

    The kubelet evicts a pod whose files exceed the limit of ephemeral-storage, or the size limit of a volume. What the
    stage itself needs is left free, and a tenth of the rest for logs; half of the limit for a model outside the
    catalogue.
    """
    needed = requests.needs(run.resolved.run_config, stage.name) if run.resolved.run_config else None
    given = Given(build(run, stage, config), setting(stage.name))
    tightest = StageDisk(run.spec, stage.name, needed, given, config.pod_settings).tightest_of_cache()
    if tightest is None:
        return None
    bound, taken = tightest
    free = amount(bound.limit) / 2 if needed is None else (amount(bound.limit) - taken) * 9 / 10
    room = float(free) / GIB
    if room >= DEFAULT_CACHE_GIB:
        return None
    return int(room) if room >= 1 else max(_LEAST_CACHE_GIB, int(room * 100) / 100)


def setting(stage: str) -> str:
    """The field of the spec that sets the resources of a stage."""
    field = stage_field(stage)
    own = f"spec.podTemplate.stageResources.{field}"
    return own if field in StageResources.model_fields else "spec.podTemplate.resources"


def _with_gpus(resources: Amounts, resource: str, gpus: int) -> dict[str, Any]:
    limits = {k: v for k, v in (resources.get("limits") or {}).items() if k not in (GPU, resource)}
    requests = {k: v for k, v in (resources.get("requests") or {}).items() if k not in (GPU, resource)}
    if gpus:  # an extended resource: its request defaults to its limit and must equal it
        limits[resource] = str(gpus)
    return {k: v for k, v in {**resources, "limits": limits, "requests": requests}.items() if v}


def _within_limits(defaults: Amounts, limits: Amounts) -> dict[str, Any]:
    """The defaults, with the workers' limits: a namespace's quota asks every pod for the same limits."""
    own = defaults.get("limits") or {}
    requests = defaults.get("requests") or {}
    derived = {
        k: max(v, least, requests.get(k, least), key=amount)
        for k, v in limits.items()
        if k not in own and (least := _DERIVED.get(k))
    }
    return {**defaults, "limits": {**derived, **own}} if derived else {**defaults}

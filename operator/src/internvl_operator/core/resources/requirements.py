"""Build the requests and limits of a worker, from the spec and the operator's defaults."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from internvl_api.constants import GPU
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.pods import stage_field

from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.stages import Stage

Amounts = Mapping[str, Any]
# The limits of workers that other stages get too, and the least of each: a worker of a small model may need less than
# the merge of its weights. A worker's other limits (network cards, huge pages, scratch disk) are its own.
_DERIVED = {"cpu": "1", "memory": "4Gi"}
_UNITS = {unit: Decimal(1000) ** power for power, unit in enumerate(("n", "u", "m", "", *"kMGTPE"), start=-3)}
_UNITS |= {f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", start=1)}


def build(spec: InternVLFineTuneSpec, stage: Stage, config: OperatorConfig) -> dict[str, Any]:
    """`resources` of the trainer's container. A stage without GPUs never asks for one."""
    template = spec.pod_template
    given = template.stage_resources.of(stage.name)
    if stage.parallel:
        given = template.resources if given is None else given
        return _with_gpus(config.worker_resources if given is None else given, stage.gpus(spec))
    if given is not None:
        return _with_gpus(given, 0)
    return _within_limits(config.stage_resources, (template.resources or {}).get("limits") or {})


def setting(stage: str) -> str:
    """The field of the spec that sets the resources of a stage."""
    return "spec.podTemplate.resources" if stage == "train" else f"spec.podTemplate.stageResources.{stage_field(stage)}"


def _with_gpus(resources: Amounts, gpus: int) -> dict[str, Any]:
    limits = {k: v for k, v in (resources.get("limits") or {}).items() if k != GPU}
    requests = {k: v for k, v in (resources.get("requests") or {}).items() if k != GPU}
    if gpus:  # an extended resource: its request defaults to its limit and must equal it
        limits[GPU] = str(gpus)
    return {k: v for k, v in {**resources, "limits": limits, "requests": requests}.items() if v}


def _within_limits(defaults: Amounts, limits: Amounts) -> dict[str, Any]:
    """The defaults, with the workers' limits: a namespace's quota asks every pod for the same limits."""
    own = defaults.get("limits") or {}
    requests = defaults.get("requests") or {}
    derived = {
        k: max(v, least, requests.get(k, least), key=size)
        for k, v in limits.items()
        if k not in own and (least := _DERIVED.get(k))
    }
    return {**defaults, "limits": {**derived, **own}} if derived else {**defaults}


def size(quantity: Any) -> Decimal:
    """A quantity as a number, for comparisons; infinity for one that is not understood.

    >>> size("512Mi") < size("1e9") < size("1Gi"), size("100m") < size(1)
    (True, True)
    """
    number, unit = re.findall(r"^(.*?)([A-Za-z]*)$", str(quantity))[0]
    try:
        return Decimal(number) * _UNITS[unit]
    except (ArithmeticError, KeyError):
        return Decimal("Infinity")

"""Requests and limits of a stage: the spec's, else the operator's settings, and the disk that follows from them."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from internvl_api.pipeline import PARALLEL_STAGES
from internvl_api.quantity import amount
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.pods import stage_field
from internvl_api.status import StageName

Amounts = Mapping[str, Any]
DISK = "ephemeral-storage"
TOLERATED = 0.9  # of an estimate; what is given may be so much of it without a warning


class PodSettings(NamedTuple):
    """The operator's settings of pods, as far as they bound what a stage gets.

    Attributes:
        workers: requests and limits of a stage on GPUs whose spec gives none; None: they are derived.
        others: the same, of a stage without GPUs.
        disk: size limit of /scratch and of /cache, each, without a limit of ephemeral-storage; None: not known.
        is_cache_of_node: /cache is a folder of the node, which no limit of the pod bounds.
    """

    workers: Amounts | None = None
    others: Amounts | None = None
    disk: str | None = None
    is_cache_of_node: bool = False


class Given(NamedTuple):
    """Requests and limits that are given, and where; None for those that are derived."""

    amounts: Amounts | None
    place: str
    is_of_spec: bool = True

    def amount(self, kind: Literal["limits", "requests"], name: str) -> Any:
        """The limit or request of a resource; None where none is given. A limit alone is the request too."""
        return ((self.amounts or {}).get(kind) or {}).get(name)


def given_for(
    spec: InternVLFineTuneSpec,
    stage: StageName,
    settings: PodSettings = PodSettings(),  # noqa: B008 - immutable
) -> Given:
    """What the spec gives for a stage, else the operator's settings; without settings: what the spec gives, if any."""
    template, is_parallel = spec.pod_template, stage in PARALLEL_STAGES
    own = template.stage_resources.of(stage)
    if own is not None:
        return Given(own, f"spec.podTemplate.stageResources.{stage_field(stage)}")
    if is_parallel and template.resources is not None:
        return Given(template.resources, "spec.podTemplate.resources")
    setting, name = (settings.workers, "workerResources") if is_parallel else (settings.others, "stageResources")
    return Given(setting, f"the operator's setting {name}", is_of_spec=False)


def disk_limit(resources: Amounts, default: str) -> str:
    """Size limit of /scratch and of /cache, each: the container's limit of ephemeral-storage where there is one.

    Else the default, or what the container requests when that is more.
    """
    limit = (resources.get("limits") or {}).get(DISK)
    if limit is not None:
        return str(limit)
    request = str((resources.get("requests") or {}).get(DISK, "0"))
    return max((default, request), key=amount)

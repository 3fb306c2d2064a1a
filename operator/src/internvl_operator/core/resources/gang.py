"""Labels, annotations and PodGroups for each gang scheduler.

Sources: kueue, docs "Run Plain Pods" and pkg/controller/jobs/pod/constants; volcano,
staging/src/volcano.sh/apis/pkg/apis/scheduling/v1beta1; scheduler-plugins, apis/scheduling/v1alpha1.
"""

from typing import Any

from internvl_api.spec import Scheduling

from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.resources import names
from internvl_operator.core.resources.ownership import owned_metadata
from internvl_operator.core.run import Run
from internvl_operator.core.stages import Stage

# Scheduler -> resource of its PodGroups in the API client. Below: scheduler -> (API version, schedulerName).
GROUPS = {"volcano": "PodGroup.scheduling.volcano.sh", "coscheduling": "PodGroup.scheduling.x-k8s.io"}
_SCHEDULERS = {
    "volcano": ("scheduling.volcano.sh/v1beta1", "volcano"),
    "coscheduling": ("scheduling.x-k8s.io/v1alpha1", "scheduler-plugins-scheduler"),
}


def pod_groups(run: Run, stage: Stage) -> list[dict[str, Any]]:
    """The PodGroup to apply for a stage, so that its pods are scheduled together or not at all; empty without one."""
    scheduling = run.spec.scheduling
    if scheduling.gang not in _SCHEDULERS:
        return []
    version, _ = _SCHEDULERS[scheduling.gang]
    size = stage.size(run.spec)
    least = run.spec.min_workers or size if stage.parallel else 1  # of preflight, only the first pod must run
    spec: dict[str, Any] = {"minMember": min(size, least)}
    if scheduling.gang == "volcano":
        chosen = {"queue": scheduling.queue, "priorityClassName": run.spec.pod_template.priority_class_name}
        spec |= {key: value for key, value in chosen.items() if value}
    metadata = owned_metadata(run, names.pod_group(run.name, stage.name), names.shared_labels(run.name, run.uid))
    return [{"apiVersion": version, "kind": "PodGroup", "metadata": metadata, "spec": spec}]


def labels(run: Run, stage: Stage, attempt: int) -> dict[str, str]:
    """Labels of a pod."""
    scheduling = run.spec.scheduling
    if scheduling.gang == "kueue":
        return {
            "kueue.x-k8s.io/queue-name": scheduling.queue or "",
            "kueue.x-k8s.io/pod-group-name": names.queue_group(run.name, stage.name, attempt),
        }
    if scheduling.gang == "coscheduling":
        return {"scheduling.x-k8s.io/pod-group": names.pod_group(run.name, stage.name)}
    return {}


def annotations(run: Run, stage: Stage) -> dict[str, str]:
    """Annotations of a pod. A kueue group that lost a pod has ended: a new attempt is a new group."""
    scheduling = run.spec.scheduling
    if scheduling.gang == "kueue":
        return {
            "kueue.x-k8s.io/pod-group-total-count": str(stage.size(run.spec)),
            "kueue.x-k8s.io/retriable-in-group": "false",
        }
    if scheduling.gang == "volcano":
        return {"scheduling.k8s.io/group-name": names.pod_group(run.name, stage.name)}
    return {}


def scheduler_name(scheduling: Scheduling) -> str | None:
    """spec.schedulerName of a pod; None: the cluster's default."""
    if scheduling.scheduler_name or scheduling.gang not in _SCHEDULERS:
        return scheduling.scheduler_name
    return _SCHEDULERS[scheduling.gang][1]


def not_enabled(scheduling: Scheduling, config: OperatorConfig) -> str | None:
    """Why this operator cannot use the gang scheduler (it may not write its PodGroups); None when it can."""
    if scheduling.gang not in GROUPS or scheduling.gang in config.gang_schedulers:
        return None
    have = ", ".join(config.gang_schedulers) or "none"
    return (
        f"spec.scheduling.gang: found {scheduling.gang!r}, but this operator was installed with the gang schedulers "
        f"{have} (and kueue); add it to the chart's gangSchedulers, or choose another"
    )

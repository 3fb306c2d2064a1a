"""Add a network profile to the pod of a training worker."""

from collections.abc import Sequence
from typing import Any

from internvl_operator.core.network_profiles import NetworkProfile


def with_network(pod: dict[str, Any], profile: NetworkProfile) -> dict[str, Any]:
    """The pod with what the profile has. What the pod has already of the same name stays."""
    (trainer,) = pod["spec"]["containers"]
    metadata = pod["metadata"]
    return pod | {
        "metadata": metadata | {"annotations": profile.annotations | metadata["annotations"]},
        "spec": pod["spec"] | _pod_parts(pod["spec"], profile) | {"containers": [_trainer(trainer, profile)]},
    }


def _pod_parts(spec: dict[str, Any], profile: NetworkProfile) -> dict[str, Any]:
    parts: dict[str, Any] = {"volumes": _added(spec["volumes"], profile.volumes, "name")}
    if profile.host_network:
        parts |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if profile.resource_claims:
        parts["resourceClaims"] = [*spec.get("resourceClaims", []), *profile.resource_claims]
    if profile.sidecars:  # with restartPolicy Always they run beside the trainer and end with it
        parts["initContainers"] = [{**each, "restartPolicy": "Always"} for each in profile.sidecars]
    return parts


def _trainer(container: dict[str, Any], profile: NetworkProfile) -> dict[str, Any]:
    resources = dict(container["resources"])
    if profile.resources:  # extended resources: a request defaults to its limit and must equal it
        resources["limits"] = profile.resources | (resources.get("limits") or {})
    if profile.resource_claims:
        claims = [{"name": claim["name"]} for claim in profile.resource_claims]
        resources["claims"] = [*resources.get("claims", []), *claims]
    security = dict(container["securityContext"])
    if profile.capabilities:
        security["capabilities"] = security["capabilities"] | {"add": [*profile.capabilities]}
    env = [{"name": name, "value": value} for name, value in profile.env.items()]
    return container | {
        "resources": resources,
        "securityContext": security,
        "env": _added(container["env"], env, "name"),
        "volumeMounts": _added(container["volumeMounts"], profile.volume_mounts, "mountPath"),
    }


def _added(own: Sequence[Any], more: Sequence[Any], key: str) -> list[Any]:
    """The pod's own parts, and those of the profile whose `key` none of them has."""
    taken = {part[key] for part in own}
    return [*own, *(part for part in more if part[key] not in taken)]

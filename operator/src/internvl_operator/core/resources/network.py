"""Add a network profile to the pod of a training worker."""

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
    taken = {volume["name"] for volume in spec["volumes"]}
    parts: dict[str, Any] = {"volumes": [*spec["volumes"], *(v for v in profile.volumes if v.get("name") not in taken)]}
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
    named = {item["name"] for item in container["env"]}
    paths = {mount["mountPath"] for mount in container["volumeMounts"]}
    return container | {
        "resources": resources,
        "securityContext": security,
        "env": [
            *container["env"],
            *({"name": name, "value": value} for name, value in profile.env.items() if name not in named),
        ],
        "volumeMounts": [
            *container["volumeMounts"],
            *(mount for mount in profile.volume_mounts if mount.get("mountPath") not in paths),
        ],
    }

"""What a worker of training gets for the network between nodes: a profile, built in or the administrator's.

Sources: NCCL's list of environment variables (NCCL 2.29); the resource names are those in the documentation of
NVIDIA's network operator (rdma/rdma_shared_device_a) and of the AWS EFA device plugin (vpc.amazonaws.com/efa).
gke_tcpxo.py names its own.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from internvl_api.types import ApiModel
from internvl_api.validation.policy import ANY, Policy
from internvl_api.validation.policy_rules import RULES
from pydantic import AfterValidator, ConfigDict, Field

from internvl_operator.core import gke_tcpxo
from internvl_operator.core.observe import CONTAINER


def _with_names(parts: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    names = [part.get("name") for part in parts]
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"found {name!r}, expected a name in each part")
        if names.count(name) > 1:
            raise ValueError(f"found {name!r} twice, expected a name of its own in each part")
        if name == CONTAINER:
            raise ValueError(f"found {name!r}, the name of the trainer's container; choose another")
    return parts


def _with_paths(mounts: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    for mount in mounts:
        if not all(isinstance(mount.get(key), str) for key in ("name", "mountPath")):
            raise ValueError(f"found {mount}, expected name and mountPath in each mount")
    return mounts


_Parts = Annotated[tuple[dict[str, Any], ...], AfterValidator(_with_names)]
_Mounts = Annotated[tuple[dict[str, Any], ...], AfterValidator(_with_paths)]


class NetworkProfile(ApiModel):
    """One profile. Its parts have Kubernetes' own format and are passed through."""

    model_config = ConfigDict(frozen=True)

    extends: Literal["infiniband", "roce", "efa", "gke-tcpxo"] | None = Field(
        None, description="Built-in profile whose parts this one has too; fields of a part of the same name replace its"
    )
    gpus_per_worker: int | None = Field(
        None, ge=1, le=16, description="The only gpusPerWorker that this profile works with; default: any"
    )
    resources: dict[str, str] = Field(default_factory=dict, description="Limits of extended resources, of a worker")
    capabilities: tuple[str, ...] = Field((), description="Linux capabilities to add, such as IPC_LOCK")
    host_network: bool = Field(False, description="Use the network of the node")
    resource_claims: _Parts = Field(
        (), description="Resource claims of the pod (dynamic resource allocation); the trainer gets all of them"
    )
    sidecars: _Parts = Field((), description="Containers that run beside the trainer")
    volumes: _Parts = Field((), description="Volumes of the pod")
    volume_mounts: _Mounts = Field((), description="Where the trainer mounts them")
    annotations: dict[str, str] = Field(default_factory=dict, description="Annotations of the pod")
    env: dict[str, str] = Field(
        default_factory=dict, description="Environment of the trainer; podTemplate.env of the run wins"
    )


Profiles = Annotated[dict[str, NetworkProfile], Field(max_length=50)]

# NCCL_NET names the transport, so that NCCL fails where it is missing instead of using TCP silently.
BUILT_IN: dict[str, NetworkProfile] = {
    "none": NetworkProfile(),
    "infiniband": NetworkProfile(
        resources={"rdma/rdma_shared_device_a": "1"}, capabilities=("IPC_LOCK",), env={"NCCL_NET": "IB"}
    ),
    "roce": NetworkProfile(
        resources={"rdma/rdma_shared_device_a": "1"},
        capabilities=("IPC_LOCK",),
        env={"NCCL_NET": "IB", "NCCL_IB_ROCE_VERSION_NUM": "2"},
    ),
    "efa": NetworkProfile(
        resources={"vpc.amazonaws.com/efa": "4"},
        capabilities=("IPC_LOCK",),
        env={"FI_PROVIDER": "efa", "NCCL_NET": "AWS Libfabric", "FI_EFA_USE_HUGE_PAGE": "0"},
    ),
    "gke-tcpxo": NetworkProfile(
        gpus_per_worker=gke_tcpxo.GPUS,
        annotations=gke_tcpxo.ANNOTATIONS,
        sidecars=(gke_tcpxo.SIDECAR,),
        volumes=gke_tcpxo.VOLUMES,
        volume_mounts=gke_tcpxo.MOUNTS,
        env=gke_tcpxo.ENV,
    ),
    "host": NetworkProfile(host_network=True),
}


def find_profile(name: str, own: Mapping[str, NetworkProfile]) -> NetworkProfile:
    """A profile by name, the administrator's before a built-in one; the pod network for an unknown name."""
    return _whole(own[name]) if name in own else BUILT_IN.get(name, NetworkProfile())


def _whole(profile: NetworkProfile) -> NetworkProfile:
    """The profile with the parts of the one that it extends."""
    if profile.extends is None:
        return profile
    base = BUILT_IN[profile.extends]
    return NetworkProfile(
        gpus_per_worker=profile.gpus_per_worker or base.gpus_per_worker,
        resources=base.resources | profile.resources,
        capabilities=tuple(dict.fromkeys((*base.capabilities, *profile.capabilities))),
        host_network=base.host_network or profile.host_network,
        resource_claims=_replaced(base.resource_claims, profile.resource_claims),
        sidecars=_laid_over(base.sidecars, profile.sidecars, "name"),
        volumes=_replaced(base.volumes, profile.volumes),
        volume_mounts=_laid_over(base.volume_mounts, profile.volume_mounts, "mountPath"),
        annotations=base.annotations | profile.annotations,
        env=base.env | profile.env,
    )


def required_gpus(own: Mapping[str, NetworkProfile]) -> tuple[tuple[str, int], ...]:
    """The profiles that work with one number of GPUs of a worker alone, each with this number."""
    found = ((name, find_profile(name, own).gpus_per_worker) for name in sorted({*BUILT_IN, *own}))
    return tuple((name, gpus) for name, gpus in found if gpus is not None)


def _laid_over(base: _Parts, own: _Parts, key: str) -> _Parts:
    """The parts of both. Two parts with the same `key` become one with the fields of both; those of `own` win."""
    parts = {part[key]: part for part in base}
    for part in own:
        parts[part[key]] = parts.get(part[key], {}) | part
    return tuple(parts.values())


def _replaced(base: _Parts, own: _Parts) -> _Parts:
    """The parts of both; of two with the same name that of `own`: a volume or claim has one source."""
    return tuple({part["name"]: part for part in (*base, *own)}.values())


def with_known_profiles(policy: Policy, own: dict[str, NetworkProfile]) -> Policy:
    """The policy with `*` of networkProfiles replaced by the names of profiles that exist, without reserved ones."""
    reserved = next(rule.reserved for rule in RULES if rule.setting == "networkProfiles")
    listed, known = policy.network_profiles, BUILT_IN | own
    every = [name for name in known if not reserved.has(name)] if ANY in listed else []
    named = [name for name in listed if name in known]
    return policy.model_copy(update={"network_profiles": tuple(dict.fromkeys([*every, *named]))})

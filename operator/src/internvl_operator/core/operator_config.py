"""The administrator's configuration for all runs; `settings` reads it from the environment."""

from dataclasses import dataclass, field
from typing import Any

from internvl_api.types import ApiModel
from internvl_api.validation.policy import Policy
from pydantic import ConfigDict, Field


class PodDefaults(ApiModel):
    """What the administrator adds to every pod of a run; the policy does not check it."""

    model_config = ConfigDict(frozen=True)

    node_selector: dict[str, str] = Field(
        default_factory=dict, description="Labels that a pod's node must have; they win over the run's"
    )
    tolerations: tuple[dict[str, Any], ...] = Field((), description="Tolerations besides the run's")
    image_pull_secrets: tuple[dict[str, str], ...] = Field((), description="Pull secrets besides the run's")
    security_context: dict[str, Any] = Field(
        default_factory=dict,
        description="More of the pod's securityContext, such as supplementalGroups; it wins over the operator's",
    )


class PodSecurity(ApiModel):
    """uid, gid and fsGroup of the pods of runs; one that is None is left out."""

    model_config = ConfigDict(frozen=True)

    run_as_user: int | None = Field(None, ge=1, le=2**31 - 1)
    run_as_group: int | None = Field(None, ge=0, le=2**31 - 1)
    fs_group: int | None = Field(None, ge=0, le=2**31 - 1)


# The user of the image, as its Dockerfile says.
IMAGES_USER = PodSecurity(run_as_user=10001, run_as_group=10001, fs_group=10001)


@dataclass(frozen=True)
class OperatorConfig:
    """Defaults of pods, and limits of waits in seconds."""

    trainer_image: str = "localhost/internvl-trainer:dev"
    image_pull_policy: str = "IfNotPresent"
    pod_security: PodSecurity = IMAGES_USER
    scratch_size_limit: str = "500Gi"  # of /scratch and of /cache, each
    cache_host_path: str | None = None
    allow_private_addresses: bool = False  # for https:// sources
    gpu_memory: int | None = None  # bytes of one GPU
    gang_schedulers: tuple[str, ...] = ()  # whose PodGroups the operator may write and watch
    network_policy_peers: tuple[dict[str, Any], ...] | None = None  # who may reach /metrics; None: no NetworkPolicy
    policy: Policy = field(default_factory=Policy)  # what runs may ask for their pods
    pod_defaults: PodDefaults = field(default_factory=PodDefaults)
    stage_resources: dict[str, Any] = field(default_factory=lambda: {"requests": {"cpu": "100m", "memory": "512Mi"}})
    worker_resources: dict[str, Any] = field(default_factory=lambda: {"requests": {"cpu": "1", "memory": "2Gi"}})
    retry_base: float = 10.0
    retry_cap: float = 300.0
    settle: float = 5.0
    force_delete_after: float = 60.0

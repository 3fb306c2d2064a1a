"""The administrator's configuration for all runs; `settings` reads it from the environment."""

from dataclasses import dataclass, field
from typing import Any

USER_ID = 10001  # the image's user


@dataclass(frozen=True)
class OperatorConfig:
    """Defaults of pods, and limits of waits in seconds."""

    trainer_image: str = "localhost/internvl-trainer:dev"
    image_pull_policy: str = "IfNotPresent"
    # uid, gid and fsGroup of every pod; without one of them, the image or an admission controller decides
    pod_security: dict[str, int] = field(
        default_factory=lambda: {"runAsUser": USER_ID, "runAsGroup": USER_ID, "fsGroup": USER_ID}
    )
    scratch_size_limit: str = "500Gi"  # of /scratch and of /cache, each
    cache_host_path: str | None = None
    allow_private_addresses: bool = False  # for https:// sources
    gpu_memory: int | None = None  # bytes of one GPU
    gang_schedulers: tuple[str, ...] = ()  # whose PodGroups the operator may write and watch
    network_policy_peers: tuple[dict[str, Any], ...] | None = None  # who may reach /metrics; None: no NetworkPolicy
    stage_resources: dict[str, Any] = field(default_factory=lambda: {"requests": {"cpu": "100m", "memory": "512Mi"}})
    worker_resources: dict[str, Any] = field(default_factory=lambda: {"requests": {"cpu": "1", "memory": "2Gi"}})
    retry_base: float = 10.0
    retry_cap: float = 300.0
    settle: float = 5.0
    force_delete_after: float = 60.0

"""The administrator's configuration for all runs; the shell reads it from the environment and passes it in."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OperatorConfig:
    """Defaults of pods, and the bounds of waiting. Durations are seconds."""

    trainer_image: str = "localhost/internvl-trainer:dev"
    image_pull_policy: str = "IfNotPresent"
    cache_host_path: str | None = None
    gpu_memory: int | None = None  # bytes of one GPU
    gang_schedulers: tuple[str, ...] = ()  # those whose PodGroups we may write and watch
    stage_resources: dict[str, Any] = field(default_factory=lambda: {"requests": {"cpu": "100m", "memory": "512Mi"}})
    worker_resources: dict[str, Any] = field(default_factory=lambda: {"requests": {"cpu": "1", "memory": "2Gi"}})
    retry_base: float = 10.0
    retry_cap: float = 300.0
    settle: float = 5.0
    force_delete_after: float = 60.0

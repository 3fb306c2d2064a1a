"""The administrator's configuration for all runs; `settings` reads it from the environment."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from internvl_api.constants import GPU
from internvl_api.memory.pod_settings import PodSettings
from internvl_api.spec.defaults import Defaults
from internvl_api.types import ApiModel
from internvl_api.validation.policy import Policy
from pydantic import AfterValidator, ConfigDict, Field

from internvl_operator.core.network_profiles import NetworkProfile, required_gpus
from internvl_operator.core.usage import Prices


class PodDefaults(ApiModel):
    """What the administrator adds to every pod of a run; the policy does not check it."""

    model_config = ConfigDict(frozen=True)

    node_selector: dict[str, str] = Field(
        default_factory=dict, description="Labels that a pod's node must have; they win over the run's"
    )
    cpu_node_selector: dict[str, str] | None = Field(
        None, description="The same, of the pods of stages without GPUs; default: nodeSelector"
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


def _without_credentials(url: str) -> str:
    """The URL or "", or ValueError for one with a user name or a password; the message shows neither."""
    if "@" in url:
        raise ValueError(
            "found a user name or a password, expected http://host:port; pods of every namespace would show it, so "
            "let runs set HTTPS_PROXY in podTemplate.env from a Secret of their namespace"
        )
    if re.fullmatch(r"(https?://[^\s/]+/?)?", url) is None:
        raise ValueError(f"found {url!r}, expected http://host:port")
    return url


ProxyUrl = Annotated[str, Field(max_length=512), AfterValidator(_without_credentials)]


class Proxy(ApiModel):
    """The proxies of every pod of a run, as the variables HTTP_PROXY, HTTPS_PROXY and NO_PROXY have them."""

    model_config = ConfigDict(frozen=True)

    http: ProxyUrl = Field("", description="For http:// addresses")
    https: ProxyUrl = Field("", description="For https:// addresses")
    no_proxy: str = Field(
        "",
        max_length=4096,
        pattern=r"^\S*$",
        description="Hosts, domains and ranges to reach directly, by comma, besides the cluster's and the run's own",
    )

    @property
    def is_set(self) -> bool:
        """Whether pods get any variable."""
        return bool(self.http or self.https or self.no_proxy)


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
    gpu_resource: str = GPU  # of which a worker gets its GPUs, unless the run names another
    gpu_memory: int | None = None  # bytes of one GPU
    node_leases: bool = False  # whether it may read the Leases of nodes
    gang_schedulers: tuple[str, ...] = ()  # whose PodGroups the operator may write and watch
    network_policy_peers: tuple[dict[str, Any], ...] | None = None  # who may reach /metrics; None: no NetworkPolicy
    policy: Policy = field(default_factory=Policy)  # what runs may ask for their pods
    pod_defaults: PodDefaults = field(default_factory=PodDefaults)
    defaults: Defaults = field(default_factory=Defaults)  # of every run
    proxy: Proxy = field(default_factory=Proxy)
    ca_bundle: str = ""  # certificates (PEM) that the pods trust instead of the image's
    network_profiles: dict[str, NetworkProfile] = field(default_factory=dict)  # the administrator's
    stage_resources: dict[str, Any] = field(default_factory=lambda: {"requests": {"cpu": "100m", "memory": "512Mi"}})
    worker_resources: dict[str, Any] = field(default_factory=lambda: {"requests": {"cpu": "1", "memory": "2Gi"}})
    prices: Prices = field(default_factory=Prices)
    notices: bool = False  # whether webhooks are called when a run ends
    retry_base: float = 10.0
    retry_cap: float = 300.0
    settle: float = 5.0
    force_delete_after: float = 60.0

    @cached_property
    def profile_gpus(self) -> tuple[tuple[str, int], ...]:
        """The network profiles that work with one number of GPUs of a worker alone, each with this number."""
        return required_gpus(self.network_profiles)

    @cached_property
    def pod_settings(self) -> PodSettings:
        """What bounds the pods of a stage; what the administrator left alone is derived instead."""
        return PodSettings(
            self.worker_resources if self.worker_resources != _BUILT_IN.worker_resources else None,
            self.stage_resources if self.stage_resources != _BUILT_IN.stage_resources else None,
            self.scratch_size_limit,
            is_cache_of_node=bool(self.cache_host_path),
        )


_BUILT_IN = OperatorConfig()

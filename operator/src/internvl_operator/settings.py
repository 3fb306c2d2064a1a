"""The settings of the operator: one environment variable each, checked at start."""

import json
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from internvl_api.address import HIDDEN, redact
from internvl_api.constants import GPU_RESOURCE_PATTERN
from internvl_api.quantity import parse_bytes
from internvl_api.spec.defaults import Defaults
from internvl_api.spec.pods import BYTES_PATTERN
from internvl_api.types import ApiModel
from internvl_api.validation.policy import Policy
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from internvl_operator.core.network_profiles import Profiles, with_known_profiles
from internvl_operator.core.operator_config import OperatorConfig, PodDefaults, PodSecurity, Proxy
from internvl_operator.core.usage import Prices

PREFIX = "INTERNVL_OPERATOR_"
DEFAULTS = OperatorConfig()
_CA_BYTES = 384 * 1024  # a ConfigMap holds 1 MiB, and run.yaml is in the same one


def _json(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


Seconds = Annotated[float, Field(gt=0)]
Resources = Annotated[dict[str, Any], BeforeValidator(_json)]


class SettingsError(ValueError):
    """An invalid environment variable; the message names it."""


class Settings(BaseModel):
    """Each field is an environment variable: `worker_threads` is INTERNVL_OPERATOR_WORKER_THREADS."""

    model_config = ConfigDict(frozen=True)

    trainer_image: str = Field(DEFAULTS.trainer_image, min_length=1, description="Image of every stage's pods")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        "IfNotPresent", description="Pull policy of the trainer image"
    )
    namespaces: tuple[str, ...] = Field(
        (), description="Namespaces to watch, comma-separated; empty: the whole cluster"
    )
    worker_threads: int = Field(8, ge=1, le=128, description="Runs reconciled concurrently")
    stage_resources: Resources = Field(
        DEFAULTS.stage_resources, description="JSON; resources of a preflight or publish pod"
    )
    worker_resources: Resources = Field(
        DEFAULTS.worker_resources,
        description="JSON; resources of a training worker whose spec.podTemplate.resources is absent",
    )
    pod_security: Annotated[PodSecurity, BeforeValidator(_json)] = Field(
        DEFAULTS.pod_security,
        description="JSON; runAsUser, runAsGroup and fsGroup of the pods of runs; one that is absent or null is left "
        "out, for the image or an admission controller to decide",
    )
    scratch_size_limit: Annotated[str, Field(pattern=BYTES_PATTERN)] = Field(
        DEFAULTS.scratch_size_limit,
        description="Size limit of /scratch and of /cache, each, in a pod without a limit of ephemeral-storage",
    )
    cache_host_path: str | None = Field(
        None,
        pattern="^/",
        description="Folder of the node, writable by every uid; /cache is its sub-folder of the run's namespace; "
        "default: emptyDir",
    )
    allow_private_addresses: bool = Field(
        False, description="true: https:// sources may be on private and loopback addresses (link-local: never)"
    )
    gang_schedulers: tuple[Literal["volcano", "coscheduling"], ...] = Field(
        (),
        description="Schedulers whose PodGroups runs may use, comma-separated: volcano, coscheduling",
    )
    gpu_resource: Annotated[str, Field(pattern=GPU_RESOURCE_PATTERN)] = Field(
        DEFAULTS.gpu_resource,
        description="Resource of which a worker gets its GPUs, such as amd.com/gpu; a run may name another",
    )
    node_leases: bool = Field(
        False,
        description="true: read the Leases of nodes (in kube-node-lease), to recognise a lost node early",
    )
    gpu_memory: str | None = Field(
        None,
        description="Memory of one GPU, such as 80Gi; runs estimated not to fit get MemoryEstimate=False",
    )
    network_policy_peers: Annotated[tuple[dict[str, Any], ...] | None, BeforeValidator(_json)] = Field(
        None,
        description="JSON; NetworkPolicyPeers (the operator, Prometheus) that may reach /metrics and /progress "
        "of runs; default: no NetworkPolicy is made",
    )
    policy: Annotated[Policy, BeforeValidator(_json)] = Field(
        DEFAULTS.policy, description="JSON; what runs may ask for their pods (docs/security.md)"
    )
    pod_defaults: Annotated[PodDefaults, BeforeValidator(_json)] = Field(
        DEFAULTS.pod_defaults, description="JSON; what every pod of a run gets (docs/security.md)"
    )
    defaults: Annotated[Defaults, BeforeValidator(_json)] = Field(
        DEFAULTS.defaults,
        description="JSON; defaults of every run in the shape of a spec (docs/tenants.md)",
    )
    proxy: Annotated[Proxy, BeforeValidator(_json)] = Field(
        DEFAULTS.proxy, description="JSON; http, https and noProxy of the pods of runs (docs/install.md)"
    )
    ca_bundle: Path | None = Field(
        None, description="File of certificates (PEM) that the pods of runs trust instead of their image's"
    )
    network_profiles: Annotated[Profiles, BeforeValidator(_json)] = Field(
        DEFAULTS.network_profiles, description="JSON; network profiles by name, beside the built-in (docs/network.md)"
    )
    prices: Annotated[Prices, BeforeValidator(_json)] = Field(
        DEFAULTS.prices,
        description="JSON; currency, and perGpuHour by resource, for the cost of runs (docs/notices.md)",
    )
    notifications: Path | None = Field(
        None,
        description="Folder with the files cloudevents and slack: URLs, one a line, that are called when a run ends "
        "(docs/notices.md)",
    )
    progress_interval_seconds: Seconds = Field(5.0, description="Time between two requests to a run's /progress")
    progress_threads: int = Field(8, ge=1, le=64, description="Concurrent requests to /progress")
    retry_base_seconds: Seconds = Field(
        DEFAULTS.retry_base, description="First wait before a stalled or failing stage starts again"
    )
    retry_cap_seconds: Seconds = Field(
        DEFAULTS.retry_cap, description="Longest wait before a stalled or failing stage starts again"
    )
    settle_seconds: float = Field(
        DEFAULTS.settle,
        ge=0,
        description="After a worker's failure, wait this long for its peers, to find who failed first",
    )
    force_delete_after_seconds: Seconds = Field(
        DEFAULTS.force_delete_after,
        description="Time past its grace period after which a pod is deleted by force (its node is dead)",
    )
    watch_timeout_seconds: Seconds = Field(
        60.0, description="Duration of one watch request; a silent one is ended 10 s later"
    )
    request_timeout_seconds: Seconds = Field(30.0, description="Time-out of one request to the API server")
    resync_seconds: Seconds = Field(
        300.0, description="Runs and their children are listed at least this often; a lost event delays a run no longer"
    )
    leader_election: bool = Field(
        False, description="true: work only while holding the Lease, so that several replicas may run"
    )
    lease_namespace: str = Field("default", min_length=1, description="Namespace of the Lease")
    lease_name: str = Field(
        "internvl-operator", min_length=1, description="Name of the Lease; one for each set of replicas"
    )
    lease_identity: str | None = Field(
        None, description="Unique name of this replica; default: the host name and a random part"
    )
    lease_seconds: float = Field(
        15.0, ge=1, le=3600, description="A replica that does not renew the Lease for this long loses it to another"
    )
    webhook_port: int | None = Field(
        None, ge=1, le=65535, description="HTTPS port of the admission webhook; default: no webhook"
    )
    webhook_certificates: Path = Field(
        Path("/etc/internvl/webhook"),
        description="Folder of the webhook's tls.crt and tls.key; reloaded when they change; not read when "
        "webhook_secret is set",
    )
    webhook_secret: str | None = Field(
        None,
        description="Name of an existing Secret in the Lease's namespace, in which the operator makes and renews the "
        "webhook's certificate",
    )
    webhook_service: str = Field(
        "internvl-operator-webhook", min_length=1, description="Service in front of the webhook, for its certificate"
    )
    webhook_configuration: str = Field(
        "internvl-operator-webhook",
        min_length=1,
        description="ValidatingWebhookConfiguration whose caBundle the operator keeps, when webhook_secret is set",
    )
    metrics_port: int = Field(8000, ge=0, le=65535, description="Port of Prometheus metrics; 0: any free port")
    metrics_secret: Path | None = Field(
        None,
        description="Folder with tls.crt, tls.key and token; /metrics is then served over TLS, to clients that send "
        "the token (Authorization: Bearer)",
    )
    liveness_port: int = Field(8080, ge=1, le=65535, description="Port of GET /healthz and /readyz")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")
    log_format: Literal["plain", "json"] = Field("plain", description="plain or json")

    @field_validator("namespaces", "gang_schedulers", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("gpu_memory")
    @classmethod
    def _amount(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "Settings":
        """Read the process environment (or `env`). Raises SettingsError naming the variable."""
        env = os.environ if env is None else env
        given = {name: env[variable(name)] for name in cls.model_fields if env.get(variable(name), "") != ""}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name, *below = map(str, first["loc"])
            found = first["input"] if below else given.get(name)
            shown = HIDDEN if name == "proxy" and "@" in repr(found) else redact(repr(found))
            raise SettingsError(f"{'.'.join([variable(name), *below])}: found {shown}: {first['msg']}") from None

    def operator_config(self) -> OperatorConfig:
        """The settings that the core uses. Raises SettingsError for an unusable `ca_bundle`."""
        return OperatorConfig(
            trainer_image=self.trainer_image,
            image_pull_policy=self.image_pull_policy,
            pod_security=self.pod_security,
            scratch_size_limit=self.scratch_size_limit,
            cache_host_path=self.cache_host_path,
            allow_private_addresses=self.allow_private_addresses,
            gpu_resource=self.gpu_resource,
            gpu_memory=parse_bytes(self.gpu_memory) if self.gpu_memory else None,
            node_leases=self.node_leases,
            gang_schedulers=self.gang_schedulers,
            network_policy_peers=self.network_policy_peers,
            policy=with_known_profiles(self.policy, self.network_profiles),
            network_profiles=self.network_profiles,
            pod_defaults=self.pod_defaults,
            defaults=self.defaults,
            proxy=self.proxy,
            ca_bundle=_authorities(self.ca_bundle) if self.ca_bundle else "",
            stage_resources=self.stage_resources,
            worker_resources=self.worker_resources,
            prices=self.prices,
            notices=self.notifications is not None,
            retry_base=self.retry_base_seconds,
            retry_cap=self.retry_cap_seconds,
            settle=self.settle_seconds,
            force_delete_after=self.force_delete_after_seconds,
        )


def _authorities(path: Path) -> str:
    """The certificates of a file. It is copied into a ConfigMap of each run, which its users may read."""
    try:
        with path.open("rb") as file:
            content = file.read(_CA_BYTES + 1)
        text, problem = content.decode(), _problem(path, content)
    except (OSError, ValueError) as error:
        problem = f"{error}; expected certificates (PEM)"
    if problem:
        raise SettingsError(f"{variable('ca_bundle')}: {path}: {problem}")
    return text


def _problem(path: Path, content: bytes) -> str | None:
    """Why clients could not use a file of certificates, or should not get it. Raises OSError for what is not PEM."""
    if len(content) > _CA_BYTES:
        return f"found more than {_CA_BYTES} bytes; each run has a copy, so keep only the authorities that runs need"
    if b"PRIVATE KEY" in content:
        return "found a private key, which pods of every namespace would show; expected only certificates"
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    return None


def variable(field: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field.upper()


def help_text() -> str:
    """One line for each variable, with its default; for --help."""
    lines = []
    for name, info in Settings.model_fields.items():
        default = _shown(info.default)
        lines.append(f"  {variable(name)}={default}\n      {info.description}")
    return "\n".join(lines)


def _shown(default: object) -> object:
    if isinstance(default, ApiModel):
        return json.dumps(default.to_dict())
    return json.dumps(default) if isinstance(default, dict) else (default or "")

"""Build the pods of a group; one builder for every stage."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from internvl_api.constants import (
    ANNOTATION_DEFAULTS_DIGEST,
    ANNOTATION_POD_DIGEST,
    ANNOTATION_RUN_DIGEST,
    CACHE_PATH,
    CONFIG_FOLDER,
    CONFIG_PATH,
    ENV_ADOPTED_UIDS,
    ENV_ALLOW_PRIVATE_ADDRESSES,
    ENV_ATTEMPT,
    ENV_CACHE_GIB,
    ENV_IMAGE,
    ENV_JOB_UID,
    ENV_USAGE,
    MASTER_PORT,
    METRICS_PORT,
    PVC_ROOT,
    SCRATCH_PATH,
    SHM_PATH,
    TERMINATION_MESSAGE_PATH,
)
from internvl_api.memory.pod_settings import disk_limit
from internvl_api.memory.stop_time import DEFAULT_GRACE_SECONDS
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.pods import PodTemplate
from internvl_api.status import Usage

from internvl_operator.core.network_profiles import NetworkProfile, find_profile
from internvl_operator.core.observe import CONTAINER
from internvl_operator.core.operator_config import OperatorConfig, PodDefaults
from internvl_operator.core.resources import credentials, egress, gang, names, node_affinity, requirements
from internvl_operator.core.resources.network import with_network
from internvl_operator.core.resources.ownership import owned_metadata
from internvl_operator.core.run import Run
from internvl_operator.core.stages import Stage

DEFAULT_IMAGE = "the chart's trainer.image (spec.podTemplate.image is not set)"
_CACHE = "cache"  # name of the volume
# By default pods stay on an unreachable node for five minutes, while the whole group waits. Half a minute after the
# node is declared lost is enough to tell a network outage from a lost node.
_LOST_NODE_SECONDS = 30


def build(
    run: Run,
    stage: Stage,
    attempt: int,
    rank: int,
    config: OperatorConfig,
    avoid: Sequence[str] = (),
    adopted: Sequence[str] = (),
    usage: Usage | None = None,
) -> dict[str, Any]:
    """The object to apply for one worker. Raises SpecError when the run's spec is invalid.

    `avoid`: names of nodes that it must not run on; `adopted`: uids of earlier runs whose pods the run has adopted.
    `usage`: of the run so far, for the report.
    """
    spec, template, defaults = run.spec, run.spec.pod_template, config.pod_defaults
    tolerations = [*template.tolerations, *defaults.tolerations]
    labels = names.worker_labels(run.name, run.uid, stage.name, attempt, rank)
    labels |= gang.labels(run, stage, attempt)
    metadata = owned_metadata(run, names.pod(run.name, stage.name, rank), {**template.labels, **labels})
    metadata["annotations"] = template.annotations | _annotations(run, stage, config) | gang.annotations(run, stage)
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "hostname": metadata["name"],
        "subdomain": names.service(run.name),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _grace_seconds(run, stage),
        "securityContext": config.pod_security.to_dict()
        | {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        | defaults.security_context,
        "tolerations": [*tolerations, *_lost_node_tolerations(tolerations)],
        "containers": [_container(run, stage, attempt, rank, config, adopted, usage)],
        "volumes": _volumes(run, stage, config),
    }
    if claims := requirements.gpu_claims(spec, stage):
        pod["resourceClaims"] = claims
    placement = _placement(spec, stage, defaults, avoid)
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod | placement}
    return with_network(whole, _profile(run, config)) if stage.name == "train" else whole


def defaults_digest(run: Run, stage: Stage, config: OperatorConfig) -> str:
    """Digest of the operator's settings that a pod of this stage depends on; not of those that the spec overrides."""
    parts: dict[str, Any] = {
        "image": None if run.spec.pod_template.image else config.trainer_image,
        "pullPolicy": config.image_pull_policy,
        "resources": requirements.build(run, stage, config),
        "cache": config.cache_host_path,
        "privateAddresses": config.allow_private_addresses,
        "podDefaults": config.pod_defaults.to_dict(),
        "podSecurity": config.pod_security.to_dict(),
        "scratch": config.scratch_size_limit,
        "network": _profile(run, config).to_dict() if stage.name == "train" else None,
    }
    if config.proxy.is_set or config.ca_bundle:  # without them the digest is that of earlier operators
        parts["egress"] = [egress.env(run, config), config.ca_bundle]
    if run.defaults:
        parts["defaults"] = [run.spec.secrets.to_dict(), run.spec.scheduling.to_dict(), run.spec.pod_template.to_dict()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _profile(run: Run, config: OperatorConfig) -> NetworkProfile:
    """The network profile; an unknown one was refused, or has gone since: then the pod network is used."""
    return find_profile(run.spec.network.profile or "none", config.network_profiles)


def image_setting(spec: InternVLFineTuneSpec) -> str:
    """Where a run's image is set, for messages."""
    return "spec.podTemplate.image" if spec.pod_template.image else DEFAULT_IMAGE


def _grace_seconds(run: Run, stage: Stage) -> int:
    """The spec's grace period; else what a worker of training needs to save a checkpoint."""
    given, config = run.spec.pod_template.termination_grace_period_seconds, run.resolved.run_config
    if given is None and stage.name == "train" and config is not None and config.grace_seconds is not None:
        return config.grace_seconds
    return given or DEFAULT_GRACE_SECONDS


def _annotations(run: Run, stage: Stage, config: OperatorConfig) -> dict[str, str]:
    return {
        ANNOTATION_DEFAULTS_DIGEST: defaults_digest(run, stage, config),
        ANNOTATION_RUN_DIGEST: run.run_digest,
        ANNOTATION_POD_DIGEST: run.pod_digest,
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(METRICS_PORT),
        "prometheus.io/path": "/metrics",
    }


def _placement(spec: InternVLFineTuneSpec, stage: Stage, defaults: PodDefaults, avoid: Sequence[str]) -> dict[str, Any]:
    template = spec.pod_template
    # Each name must be unique: server-side apply keys on it.
    secrets = {each.get("name"): each for each in (*template.image_pull_secrets, *defaults.image_pull_secrets)}
    chosen = {
        "nodeSelector": _node_selector(stage, spec, template) | _node_selector(stage, spec, defaults),
        "affinity": node_affinity.without(template.affinity, avoid),
        "priorityClassName": template.priority_class_name,
        "serviceAccountName": template.service_account_name,
        "runtimeClassName": template.runtime_class_name,
        "imagePullSecrets": list(secrets.values()),
        "schedulerName": gang.scheduler_name(spec.scheduling),
    }
    return {key: value for key, value in chosen.items() if value}


def _node_selector(stage: Stage, spec: InternVLFineTuneSpec, given: PodTemplate | PodDefaults) -> dict[str, str]:
    without_gpus = not stage.gpus(spec) and given.cpu_node_selector is not None
    return (given.cpu_node_selector if without_gpus else given.node_selector) or {}


def _container(
    run: Run,
    stage: Stage,
    attempt: int,
    rank: int,
    config: OperatorConfig,
    adopted: Sequence[str],
    usage: Usage | None,
) -> dict[str, Any]:
    spec = run.spec
    return {
        "name": CONTAINER,
        "image": _image(spec, config),
        "imagePullPolicy": config.image_pull_policy,
        "command": ["internvl-trainer", stage.name, "--config", CONFIG_PATH],
        "env": _env(run, stage, attempt, rank, config, adopted, usage),
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"}],
        "resources": requirements.build(run, stage, config),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": TERMINATION_MESSAGE_PATH,
        "terminationMessagePolicy": "File",
        "volumeMounts": _mounts(run, config),
    }


def _image(spec: InternVLFineTuneSpec, config: OperatorConfig) -> str:
    return spec.pod_template.image or config.trainer_image


def _env(
    run: Run,
    stage: Stage,
    attempt: int,
    rank: int,
    config: OperatorConfig,
    adopted: Sequence[str],
    usage: Usage | None,
) -> list[Mapping[str, Any]]:
    workers, processes = stage.size(run.spec), stage.processes(run.spec)
    master = names.master_address(run.name, stage.name)
    ours = {
        "MASTER_ADDR": master,
        "MASTER_PORT": MASTER_PORT,
        "WORLD_SIZE": workers * processes,
        "RANK": rank * processes,
        "PET_NNODES": workers,
        "PET_NPROC_PER_NODE": processes,
        "PET_NODE_RANK": rank,
        "PET_MASTER_ADDR": master,
        "PET_MASTER_PORT": MASTER_PORT,
        ENV_ATTEMPT: attempt,
        ENV_JOB_UID: run.uid,
        ENV_ADOPTED_UIDS: ",".join(adopted),
        ENV_IMAGE: _image(run.spec, config),
        ENV_ALLOW_PRIVATE_ADDRESSES: "true" if config.allow_private_addresses else "false",
        **({ENV_USAGE: json.dumps(usage.to_dict())} if usage else {}),
        "HOME": SCRATCH_PATH,
        "USER": "internvl",  # libraries read it; a uid chosen by an admission controller has no name
        "TMPDIR": SCRATCH_PATH,
    }
    # Each name must be unique (server-side apply keys on it): the user's last entry wins over a
    # Secret's key and the administrator's proxies. None of these has a name of ours.
    cache = requirements.cache_gib(run, stage, config)
    of_cache = [] if cache is None else [{"name": ENV_CACHE_GIB, "value": str(cache)}]
    given = [*egress.env(run, config), *credentials.env(run, stage), *of_cache, *run.spec.pod_template.env]
    users: dict[str, Mapping[str, Any]] = {item["name"]: item for item in given}
    return [*users.values(), *({"name": name, "value": str(value)} for name, value in ours.items())]


def _volumes(run: Run, stage: Stage, config: OperatorConfig) -> list[Mapping[str, Any]]:
    resources = requirements.build(run, stage, config)
    disk = {"emptyDir": {"sizeLimit": disk_limit(resources, config.scratch_size_limit)}}
    cache: dict[str, Any] = disk
    if config.cache_host_path:
        cache = {"hostPath": {"path": config.cache_host_path, "type": "DirectoryOrCreate"}}
    ours: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": names.config_map(run.name)}},
        {"name": "scratch"} | disk,
        {"name": _CACHE} | cache,
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": requirements.shm_size(run, stage)}},
    ]
    ours += [
        {"name": volume, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
        for claim, volume in claims(run.spec).items()
    ]
    return [*ours, *run.spec.pod_template.volumes]


def _mounts(run: Run, config: OperatorConfig) -> list[Mapping[str, Any]]:
    """Our mounts and the user's, which replace ours at /scratch, /cache or /dev/shm."""
    spec = run.spec
    users = {mount["mountPath"]: mount for mount in spec.pod_template.volume_mounts}
    ours: dict[str, dict[str, Any]] = {
        CONFIG_FOLDER: {"name": "config", "readOnly": True},
        SCRATCH_PATH: {"name": "scratch"},
        # Of a folder of the node, which other namespaces use too, that of the run's namespace.
        CACHE_PATH: {"name": _CACHE, **({"subPath": run.namespace} if config.cache_host_path else {})},
        SHM_PATH: {"name": "shm"},
    }
    ours |= {f"{PVC_ROOT}/{claim}": {"name": volume, "readOnly": True} for claim, volume in claims(spec).items()}
    return [*(mount | {"mountPath": path} for path, mount in ours.items() if path not in users), *users.values()]


def claims(spec: InternVLFineTuneSpec) -> dict[str, str]:
    """PersistentVolumeClaims named in pvc:// sources -> volume names (a claim's own name may be too long for one)."""
    found = {match[1] for _, source in spec.sources() if (match := re.match(r"pvc://([^/]+)", source))}
    return {claim: f"pvc-{index}" for index, claim in enumerate(sorted(found))}


def _lost_node_tolerations(given: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    taken = {toleration.get("key") for toleration in given}
    keys = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    return [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": _LOST_NODE_SECONDS}
        for key in keys
        if key not in taken
    ]

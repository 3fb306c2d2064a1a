"""Convert raw children to types of the core. Malformed objects never raise: they are ignored or read in part."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from internvl_api.constants import (
    ANNOTATION_DEFAULTS_DIGEST,
    ANNOTATION_POD_DIGEST,
    ANNOTATION_RUN_DIGEST,
    KIND,
    LABEL_ATTEMPT,
    LABEL_NODE_RANK,
    LABEL_STAGE,
)
from internvl_api.status import CheckpointStatus, Heartbeat, Progress, StageResult

from internvl_operator.core.resources import names
from internvl_operator.core.telemetry import clean_text, read_result
from internvl_operator.core.timestamps import from_text

CONTAINER = "trainer"
_QUANTITY_LENGTH = 64  # characters of a quantity
_NAME_LENGTH = 253  # characters of a name
_LISTED = 8  # other containers of a pod, and its finalizers
_DIGITS = 18  # of a number in a label; status holds 64 bits, and another attempt may follow


@dataclass(frozen=True, slots=True)
class OtherContainer:
    """A container beside the trainer's, which an admission webhook or the administrator added to the pod."""

    name: str
    init: bool = False  # it runs to its end before the trainer starts
    running: bool = False
    waiting_reason: str = ""
    waiting_message: str = ""
    exit_code: int | None = None
    exit_words: str = ""  # reason and message of its end

    def describe(self) -> str:
        """Text for messages: `init container 'vault-agent-init'`."""
        return f"{'init container' if self.init else 'container'} {self.name!r}"


@dataclass(frozen=True, slots=True)
class Pod:
    """One worker of a group, as last seen. `exit_code` is the trainer container's, whatever else runs beside it."""

    name: str
    uid: str
    owner_uid: str
    stage: str
    attempt: int
    rank: int
    run_digest: str = ""
    pod_digest: str = ""
    defaults_digest: str = ""
    phase: str = "Pending"
    node: str | None = None
    ip: str | None = None
    deletion_timestamp: datetime | None = None  # when its grace period ends
    memory_limit: str = ""  # of the trainer's container, also where a LimitRange set it; empty: none
    container_id: str = ""  # a second id in the same pod: its node lost track of the first container
    exit_code: int | None = None
    exit_reason: str = ""  # from the container runtime: OOMKilled, Error, ContainerStatusUnknown
    finished_at: datetime | None = None
    result: StageResult | None = None
    termination_message: str = ""  # empty when it is a StageResult
    pod_reason: str = ""  # status.reason, from the kubelet or the control plane: Evicted, NodeLost
    pod_message: str = ""
    disruption_reason: str = ""  # of the DisruptionTarget condition, or KueueEviction
    disruption_message: str = ""  # message of the same condition
    ready_to_start: bool | None = None  # PodReadyToStartContainers: volumes, sandbox, network; None: not reported
    ready_to_start_message: str = ""
    waiting_reason: str = ""
    waiting_message: str = ""
    unschedulable: str = ""
    scheduling_gated: str = ""  # message of the scheduling gate that holds the pod in a queue
    start_time: datetime | None = None  # when the kubelet accepted the pod
    trainer_running: bool = False  # also while another container keeps the pod's phase at Pending
    others: tuple[OtherContainer, ...] = ()
    finalizers: tuple[str, ...] = ()  # they keep a deleted pod in the API

    @property
    def finished(self) -> bool:
        """Its trainer has exited, or the pod has a final phase."""
        return self.exit_code is not None or self.phase in ("Succeeded", "Failed")

    @property
    def succeeded(self) -> bool:
        """It exited with 0; a later deletion does not change that."""
        return self.exit_code == 0 if self.exit_code is not None else self.phase == "Succeeded"

    @property
    def running(self) -> bool:
        """Its processes run."""
        return (self.phase == "Running" or self.trainer_running) and not self.finished

    @property
    def unstarted(self) -> bool:
        """Its container has not run yet: it waits for a node, an image or a volume."""
        return self.phase == "Pending" and not (self.finished or self.trainer_running)

    @property
    def active(self) -> bool:
        """It occupies a node, or waits for one: a sidecar may still run when the trainer has exited."""
        return self.phase not in ("Succeeded", "Failed")


@dataclass(frozen=True)
class LiveProgress:
    """The last /progress answer of node rank 0."""

    pod_uid: str
    progress: Progress
    checkpoint: CheckpointStatus | None = None


@dataclass(frozen=True)
class ProcessState:
    """One training process's answer to a probe; `progress` is None when it did not answer."""

    worker: int
    local_rank: int
    progress: Progress | None = None
    heartbeat: Heartbeat | None = None


@dataclass(frozen=True)
class RankAnswers:
    """The answers of all processes of some pods to one probe, in rank order."""

    asked_at: datetime
    pod_uids: frozenset[str]
    states: tuple[ProcessState, ...]


@dataclass(frozen=True)
class Silence:
    """For how many seconds a suspected pod has not answered, and its node's Lease has not been renewed.

    `renewal`: seconds between two renewals of a healthy node.
    """

    seconds: float
    renewal: float


@dataclass(frozen=True)
class Observed:
    """All children that carry the run's name, whoever owns them."""

    pods: tuple[Pod, ...] = ()
    services: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    config_maps: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    network_policies: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    pod_groups: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    live: LiveProgress | None = None
    rank_answers: RankAnswers | None = None
    delivered_notice: str | None = None  # id of the notice that every webhook has taken
    silences: Mapping[str, Silence] = field(default_factory=dict)  # by uid, of pods that the last plan suspected


def owner(raw: dict[str, Any]) -> tuple[str, str] | None:
    """(name, uid) of the InternVLFineTune that controls a child; None for a foreign object with our labels."""
    for reference in raw["metadata"].get("ownerReferences") or ():
        if reference.get("controller") and reference.get("kind") == KIND:
            return reference["name"], reference["uid"]
    return None


def read_pod(raw: dict[str, Any]) -> Pod | None:
    """A raw pod -> Pod, or None when its labels are not those of a worker."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    controller = owner(raw)
    stage, attempt, rank = (labels.get(label, "") for label in (LABEL_STAGE, LABEL_ATTEMPT, LABEL_NODE_RANK))
    if controller is None or not (_is_number(attempt) and _is_number(rank)):
        return None
    if metadata["name"] != names.pod(controller[0], stage, int(rank)):  # somebody copied our labels and owner
        return None
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        owner_uid=controller[1],
        stage=stage,
        attempt=int(attempt),
        rank=int(rank),
        run_digest=annotations.get(ANNOTATION_RUN_DIGEST, ""),
        pod_digest=annotations.get(ANNOTATION_POD_DIGEST, ""),
        defaults_digest=annotations.get(ANNOTATION_DEFAULTS_DIGEST, ""),
        phase=status.get("phase", "Pending"),
        node=(raw.get("spec") or {}).get("nodeName"),
        ip=status.get("podIP"),
        deletion_timestamp=from_text(metadata.get("deletionTimestamp")),
        start_time=from_text(status.get("startTime")),
        pod_reason=clean_text(status.get("reason")),
        pod_message=clean_text(status.get("message")),
        memory_limit=_memory_limit(raw.get("spec") or {}),
        others=tuple(_others(raw.get("spec") or {}, status))[:_LISTED],
        finalizers=tuple(clean_text(each, _NAME_LENGTH) for each in (metadata.get("finalizers") or ())[:_LISTED]),
        **_conditions(status),
        **_container(status),
    )


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit() and len(label) <= _DIGITS


def _memory_limit(spec: dict[str, Any]) -> str:
    for container in spec.get("containers") or ():
        if container.get("name") == CONTAINER:
            limits = (container.get("resources") or {}).get("limits") or {}
            return clean_text(limits.get("memory"), _QUANTITY_LENGTH)
    return ""


def _conditions(status: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for condition in status.get("conditions") or ():
        kind, state, reason = condition.get("type"), condition.get("status"), clean_text(condition.get("reason"))
        if kind == "PodScheduled" and state == "False" and reason == "Unschedulable":
            found["unschedulable"] = clean_text(condition.get("message")) or reason
        elif kind == "PodScheduled" and state == "False" and reason == "SchedulingGated":
            found["scheduling_gated"] = clean_text(condition.get("message")) or reason
        elif kind == "DisruptionTarget" and state == "True":
            found["disruption_reason"] = reason or "Disrupted"
            found["disruption_message"] = clean_text(condition.get("message"))
        elif kind == "PodReadyToStartContainers" and state in ("True", "False"):
            found["ready_to_start"], found["ready_to_start_message"] = (
                state == "True",
                clean_text(condition.get("message")),
            )
        elif kind == "TerminationTarget" and state == "True":  # set by Kueue on a group it evicts
            found["disruption_reason"] = "KueueEviction"
    return found


def _container(status: dict[str, Any]) -> dict[str, Any]:
    for container in status.get("containerStatuses") or ():
        if container.get("name") == CONTAINER:
            state = container.get("state") or {}
            ident: dict[str, Any] = {"container_id": clean_text(container.get("containerID"))}
            if terminated := state.get("terminated"):
                return ident | _terminated(terminated)
            waiting = state.get("waiting") or {}
            return ident | {
                "trainer_running": "running" in state,
                "waiting_reason": clean_text(waiting.get("reason")),
                "waiting_message": clean_text(waiting.get("message")),
            }
    return {}


def _others(spec: dict[str, Any], status: dict[str, Any]) -> Iterator[OtherContainer]:
    """The containers beside the trainer's. An init container that always restarts delays it until it has started."""
    restarting = {
        each.get("name") for each in spec.get("initContainers") or () if each.get("restartPolicy") == "Always"
    }
    for part, init in (("initContainerStatuses", True), ("containerStatuses", False)):
        for container in status.get(part) or ():
            name, state = clean_text(container.get("name"), _NAME_LENGTH), container.get("state") or {}
            if name == CONTAINER and not init:
                continue
            waiting, ended = state.get("waiting") or {}, state.get("terminated") or {}
            words = (clean_text(ended.get(key)) for key in ("reason", "message"))
            code = ended.get("exitCode")
            yield OtherContainer(
                name=name,
                init=init and not (name in restarting and (container.get("started") or ended)),
                running="running" in state,
                waiting_reason=clean_text(waiting.get("reason")),
                waiting_message=clean_text(waiting.get("message")),
                exit_code=code if isinstance(code, int) else None,
                exit_words=": ".join(filter(None, words)),
            )


def _terminated(state: dict[str, Any]) -> dict[str, Any]:
    message = state.get("message", "")
    result = read_result(message)
    return {
        "exit_code": state.get("exitCode"),
        "exit_reason": clean_text(state.get("reason")),
        "finished_at": from_text(state.get("finishedAt")),
        "result": result,
        "termination_message": "" if result else clean_text(message),
    }

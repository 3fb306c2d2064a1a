"""Each class of failure once, on two real nodes: status and `kubectl ivft why` say what docs/runbook.md has of it.

What the network and a node's death do is not here.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from e2e.harness import CHECKPOINT, NAMESPACE, STEPS, Finished, Platform, assert_same_losses, trains
from internvl_api.status import InternVLFineTuneStatus
from internvl_operator.core.resources import names
from internvl_operator.kubectl_ivft.__main__ import main as kubectl_ivft
from internvl_operator.kubectl_ivft.explain import explain
from ivft_cluster.images import base_image, pause_image
from ivft_cluster.shell import wait_for
from ivft_demo.data import BUCKET, MODEL_KEY
from ivft_demo.follow import read_status
from ivft_demo.results import losses
from kubernetes import client

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("holds")]

POISONED_KEY = f"{MODEL_KEY}-poisoned"
NO_ROOM, MORE_IMPORTANT = "classes-no-room", "classes-more-important"  # PriorityClasses
SLOT = "example.org/slot"  # a device of which a node has one


def set_to(name: str, value: str) -> dict[str, Any]:
    """A podTemplate with one variable in its environment."""
    return {"env": [{"name": name, "value": value}]}


@dataclass(frozen=True)
class Told:
    """Reason and message of a condition that is True."""

    condition: str
    reason: str
    words: str

    def by(self, status: InternVLFineTuneStatus) -> bool:
        wanted = (self.condition, "True", self.reason)
        return any(
            (each.type, each.status, each.reason) == wanted and self.words in each.message for each in status.conditions
        )


@dataclass(frozen=True)
class Case:
    """A run that fails because of its spec: the expected reasons in order, and the budget that they cost."""

    name: str
    told: tuple[Told, ...]
    spec: dict[str, Any]
    user_restarts: int = 0
    freed: dict[str, str] | None = None  # labels of pods that must be gone afterwards
    late: str | None = None  # a ConfigMap; the run continues once it exists


def create_config_map(platform: Platform, name: str) -> None:
    """An object with another owner."""
    body = {"metadata": {"name": name}, "data": {"word": "there"}}
    platform.core.create_namespaced_config_map(NAMESPACE, body)


# Runs that only need occasional checks.
WAITING = (
    Case(
        "image-missing",
        (
            Told("Stalled", "ImagePullFailed", "localhost/nowhere:1"),
            Told("Stalled", "StartDeadlineExceeded", "localhost/nowhere:1"),
        ),
        {"podTemplate": {"image": "localhost/nowhere:1"}, "runPolicy": {"startDeadlineSeconds": 5}},
        freed={"attempt": "1"},
    ),
    Case(
        "volume-missing",
        (Told("Stalled", "StartDeadlineExceeded", "check that ConfigMap nowhere exists"),),
        {
            "podTemplate": {
                "volumes": [{"name": "extra", "configMap": {"name": "nowhere"}}],
                "volumeMounts": [{"name": "extra", "mountPath": "/extra"}],
            },
            "runPolicy": {"startDeadlineSeconds": 5},
        },
        freed={"attempt": "1"},
    ),
    Case(
        "config-map-missing",
        (Told("Stalled", "InvalidPodConfig", 'configmap "classes-late" not found'),),
        {
            "podTemplate": {
                "env": [{"name": "LATE", "valueFrom": {"configMapKeyRef": {"name": "classes-late", "key": "word"}}}]
            }
        },
        late="classes-late",
    ),
    Case(
        "name-taken",
        (Told("Stalled", "NameTaken", names.config_map("name-taken")),),
        {},
    ),
    Case(
        "over-quota",
        (Told("Stalled", "QuotaExceeded", "exceeded quota: classes-no-room"),),
        {"podTemplate": {"priorityClassName": NO_ROOM}},
    ),
    Case(
        "invalid-child",
        (Told("Stalled", "InvalidChild", "not a label!"),),
        {"podTemplate": {"nodeSelector": {"disk": "not a label!"}}},
    ),
    Case(
        "no-gang",
        (Told("Stalled", "GangNotEnabled", "spec.scheduling.gang"),),
        {"scheduling": {"gang": "volcano"}},
    ),
    Case(
        "deadline",
        (Told("Failed", "DeadlineExceeded", "spec.runPolicy.activeDeadlineSeconds"),),
        {"podTemplate": {"nodeSelector": {"disk": "none"}}, "runPolicy": {"activeDeadlineSeconds": 3}},
        freed={"attempt": "1"},
    ),
    Case(
        "worker-failed",
        (
            Told(
                "Failed", "BackoffLimitExceeded", "WorkerFailed: worker 0 (pod worker-failed-preflight-0): exit code 1"
            ),
        ),
        {"podTemplate": set_to("PYTHONHOME", "/nowhere"), "runPolicy": {"backoffLimit": 0}},
    ),
    Case(
        "container-not-started",
        (Told("Stalled", "ContainerNotStarted", "spec.podTemplate.image"),),
        {"podTemplate": {"image": base_image().name}},
    ),
)
# Runs that fail in preflight.
CHECKING = (
    Case(
        "storage-away",
        (Told("Stalled", "StorageUnavailable", "127.0.0.1:9"),),
        {"podTemplate": set_to("AWS_ENDPOINT_URL", "http://127.0.0.1:9")},
    ),
    Case(
        "user-error",
        (Told("Stalled", "NotFound", f"s3://{BUCKET}/data/nowhere.jsonl"),),
        {"data": {"train": {"nowhere": {"annotation": f"s3://{BUCKET}/data/nowhere.jsonl"}}}},
    ),
)
# Runs that reach training.
TRAINING = (
    Case(
        "unschedulable",
        (
            Told("Reconciling", "Unschedulable", "Insufficient nvidia.com/gpu"),
            Told("Stalled", "SchedulingDeadlineExceeded", "Insufficient nvidia.com/gpu"),
        ),
        {
            "gpusPerWorker": 4,
            "training": {"globalBatchSize": 32},
            "runPolicy": {"schedulingDeadlineSeconds": 3},
        },
        freed={"stage": "train", "attempt": "1"},
    ),
    Case(
        "out-of-memory",
        (Told("Failed", "BackoffLimitExceeded", "OutOfMemory: worker 0 (pod out-of-memory-train-0) used more memory"),),
        {
            "workers": 1,
            "podTemplate": {"resources": {"requests": {"cpu": "100m"}, "limits": {"memory": "150Mi"}}},
            "runPolicy": {"backoffLimit": 1},
        },
        user_restarts=1,
    ),
    Case(
        "loss-not-finite",
        (Told("Failed", "LossNotFinite", "at step 1; the weights were not touched and there is no checkpoint yet"),),
        {
            "workers": 1,
            "model": {"source": f"s3://{BUCKET}/{POISONED_KEY}"},
            "runPolicy": {"cleanPodPolicy": "All"},
        },
        freed={},
    ),
    Case(
        "internal-error",
        (Told("Failed", "BackoffLimitExceeded", "InternalError: worker 0 (pod internal-error-train-0)"),),
        {"workers": 1, "podTemplate": set_to("OMP_NUM_THREADS", "many"), "runPolicy": {"backoffLimit": 0}},
    ),
    Case(
        "disk-full",
        (Told("Failed", "BackoffLimitExceeded", "DiskFull: worker 0 (pod disk-full-train-0) was evicted"),),
        {
            "workers": 1,
            "training": {"maxSteps": 1000, "epochs": 400},
            "podTemplate": {"resources": {"requests": {"cpu": "100m"}, "limits": {"ephemeral-storage": "1Ki"}}},
            "runPolicy": {"backoffLimit": 0},
        },
    ),
)
GROUPS = (WAITING, CHECKING, TRAINING)


@pytest.fixture(scope="module")
def surroundings(platform: Platform) -> Iterator[None]:
    """Set up the obstacles: a quota, an object with a name that a run needs, a broken checkpoint, devices."""
    scheduling: Any = client.SchedulingV1Api(platform.api)
    for name, value in ((NO_ROOM, 0), (MORE_IMPORTANT, 1000)):
        scheduling.create_priority_class({"metadata": {"name": name}, "value": value})
    scope = {"scopeName": "PriorityClass", "operator": "In", "values": [NO_ROOM]}
    quota = {"hard": {"pods": "0"}, "scopeSelector": {"matchExpressions": [scope]}}
    platform.core.create_namespaced_resource_quota(NAMESPACE, {"metadata": {"name": NO_ROOM}, "spec": quota})
    create_config_map(platform, names.config_map("name-taken"))
    for node in platform.cluster.node_names:
        platform.cluster.add_devices(node, SLOT, 1)
    platform.upload_poisoned_checkpoint(POISONED_KEY)
    yield
    platform.core.delete_namespaced_resource_quota(NO_ROOM, NAMESPACE)
    platform.core.delete_namespaced_config_map(names.config_map("name-taken"), NAMESPACE)
    for name in (NO_ROOM, MORE_IMPORTANT):
        scheduling.delete_priority_class(name)


@pytest.fixture(scope="module")
def begun(platform: Platform, surroundings: None) -> Callable[[Case], None]:
    """Start all cases of a group together, because each case mostly waits."""
    started: set[str] = set()

    def begin(case: Case) -> None:
        group = next(group for group in GROUPS if case in group)
        for each in group if case.name not in started else ():
            platform.apply("quickstart", each.name, **each.spec)
            started.add(each.name)

    return begin


@pytest.mark.parametrize("case", [case for group in GROUPS for case in group], ids=lambda case: case.name)
def test_status_and_why_show_the_reason_a_run_cannot_continue(
    platform: Platform, begun: Callable[[Case], None], case: Case
) -> None:
    begun(case)
    for told in case.told:
        resource = platform.wait_resource(case.name, str(told), told.by)
        explained = explain(resource, read_status(resource), datetime.now(UTC))
        assert told.reason in explained.because
        assert told.words in explained.because
        assert explained.next_step
    status = read_status(resource)
    assert (status.restarts.user, status.restarts.infrastructure) == (case.user_restarts, 0)
    if case.freed is not None:
        freed = case.freed
        wait_for("no pod of the attempt is left", lambda: not platform.pods(case.name, **freed))
    if case.late:
        create_config_map(platform, case.late)
        platform.wait(case.name, "going on", lambda status: status.phase == "Running")
        platform.core.delete_namespaced_config_map(case.late, NAMESPACE)
    platform.forget(case.name)


def test_kubectl_ivft_why_shows_the_reason_in_a_terminal(
    platform: Platform, capsys: pytest.CaptureFixture[str]
) -> None:
    platform.apply("quickstart", "why", podTemplate={"nodeSelector": {"disk": "none"}})
    platform.wait("why", "Unschedulable", Told("Reconciling", "Unschedulable", "0/2 nodes are available").by)
    assert kubectl_ivft(["why", "why", "-n", NAMESPACE, "--kubeconfig", str(platform.cluster.kubeconfig)]) == 0
    state, because, next_step = capsys.readouterr().out.splitlines()
    assert state == "why is pending"
    assert because.startswith("Unschedulable: pod why-preflight-0 finds no node: 0/2 nodes are available")
    assert next_step.startswith("next: wait for nodes, or request less")
    platform.forget("why")


def test_a_finished_run_is_deleted_after_its_ttl(platform: Platform) -> None:
    late = {"activeDeadlineSeconds": 1, "ttlSecondsAfterFinished": 2}
    platform.apply("quickstart", "short-lived", podTemplate={"nodeSelector": {"disk": "none"}}, runPolicy=late)
    platform.wait(
        "short-lived", "Failed", Told("Failed", "DeadlineExceeded", "spec.runPolicy.activeDeadlineSeconds").by
    )
    with pytest.raises(AssertionError, match="was deleted"):
        platform.wait("short-lived", "deleted", lambda status: False)
    wait_for("no child is left", lambda: not platform.children("short-lived"))


# --- one run that suffers every disturbance


@dataclass(frozen=True)
class Injury:
    """A disturbance of a training group, and the expected status of the attempt that it ends."""

    name: str
    inflict: Callable[[Platform], object]
    reason: str
    words: str
    budget: str = "none"
    heal: Callable[[Platform], object] = lambda platform: None
    marks: Sequence[pytest.MarkDecorator] = ()


def signalled(rank: int, number: signal.Signals) -> Callable[[Platform], object]:
    return lambda platform: platform.signal_worker(f"hurt-train-{rank}", number)


def evicted(platform: Platform) -> None:
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "hurt-train-1"}}
    platform.core.create_namespaced_pod_eviction("hurt-train-1", NAMESPACE, body)


def preempted(platform: Platform) -> None:
    """Create a pod with a higher priority that needs a worker's device."""
    container = {"name": "pause", "image": pause_image().name, "resources": {"limits": {SLOT: "1"}}}
    spec = {"priorityClassName": MORE_IMPORTANT, "containers": [container], "terminationGracePeriodSeconds": 0}
    platform.core.create_namespaced_pod(NAMESPACE, {"metadata": {"name": MORE_IMPORTANT}, "spec": spec})


def device_given_back(platform: Platform) -> None:
    platform.core.delete_namespaced_pod(MORE_IMPORTANT, NAMESPACE)


def stopped_and_watched(platform: Platform) -> None:
    """Stop a training process, so that it hangs."""
    platform.change("hurt", runPolicy={"progressDeadlineSeconds": 10})
    platform.signal_worker("hurt-train-1", signal.SIGSTOP)


def unwatched(platform: Platform) -> None:
    platform.change("hurt", runPolicy={"progressDeadlineSeconds": None})


INJURIES = (
    Injury(
        "killed", signalled(0, signal.SIGKILL), "WorkerKilled", "worker 0 (pod hurt-train-0): ended by SIGKILL", "user"
    ),
    Injury(
        "aborted",
        signalled(1, signal.SIGABRT),
        "WorkerAborted",
        "ended by SIGABRT",
        "infrastructure",
        marks=[pytest.mark.soak],  # but for the reason, as killed
    ),
    Injury("asked-to-stop", signalled(1, signal.SIGTERM), "Resume", "saved its state"),
    Injury(
        "evicted",
        evicted,
        "Drained",
        "worker 1 (pod hurt-train-1)",
        marks=[pytest.mark.soak],  # test_nodes drains a node
    ),
    Injury("preempted", preempted, "Preempted", "(pod hurt-train-", heal=device_given_back),
    Injury(
        "hanging",
        stopped_and_watched,
        "ProgressStalled",
        "worker 1 does not answer; the others answer at step",
        "infrastructure",
        unwatched,
    ),
)


@pytest.fixture(scope="module")
def hurt(platform: Platform, surroundings: None) -> str:
    """URI of the run's output."""
    resources = {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {SLOT: "1"}}
    pods = {"resources": resources, "terminationGracePeriodSeconds": 10}
    return platform.apply("quickstart", "hurt", training=STEPS, checkpoint=CHECKPOINT, podTemplate=pods)


@pytest.mark.parametrize("injury", [pytest.param(each, id=each.name, marks=each.marks) for each in INJURIES])
def test_a_disturbed_group_starts_a_new_attempt(platform: Platform, hurt: str, injury: Injury) -> None:
    before = platform.wait("hurt", "training", trains)
    injury.inflict(platform)
    resource = platform.wait_resource("hurt", injury.name, lambda status: status.attempt > before.attempt)
    injury.heal(platform)
    after = read_status(resource)
    (stage,) = [each for each in after.stages if each.name == "train"]
    assert stage.reason == injury.reason, stage.message
    assert injury.words in (stage.message or "")
    assert injury.reason in explain(resource, after, datetime.now(UTC)).because
    assert after.restarts.user - before.restarts.user == (injury.budget == "user")
    assert after.restarts.infrastructure - before.restarts.infrastructure == (injury.budget == "infrastructure")


def test_a_suspended_run_has_no_pods(platform: Platform, hurt: str) -> None:
    before = platform.wait("hurt", "training", trains)
    platform.change("hurt", runPolicy={"suspend": True})
    held = platform.wait("hurt", "Suspended", Told("Suspended", "Suspended", "no pod is left").by)
    assert not [pod for pod in platform.pods("hurt") if pod.status.phase in ("Pending", "Running")]
    assert held.checkpoint is not None
    assert held.restarts == before.restarts
    platform.change("hurt", runPolicy={"suspend": False})


def test_a_disturbed_and_suspended_run_has_the_same_losses(
    platform: Platform, hurt: str, undisturbed: Finished
) -> None:
    platform.follow("hurt")
    assert_same_losses(losses(platform.s3, hurt), undisturbed.curve)

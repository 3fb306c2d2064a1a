"""What keeps a group from starting, and what slow pods wait for: in words that a user can act on."""

from datetime import timedelta
from typing import Any

import pytest
from controller.builders import NOW, Raw, a_run, member, text
from controller.simulator import World
from controller.test_start_deadlines import place
from internvl_operator.core.policies.startup_problems import seconds_to_notice, slow_start, startup_problem

SPEC = a_run(secrets={"objectStorage": "s3-credentials", "huggingFace": "hf-token"}).spec
PVC = {"train": {"pets": {"annotation": "pvc://pets/rows.jsonl"}}}
VOLUMES = [
    {"name": "certificates", "secret": {"secretName": "team-ca"}},
    {"name": "lists", "configMap": {"name": "words"}},
    {"name": "shared", "persistentVolumeClaim": {"claimName": "models"}},
    {"name": "local", "emptyDir": {}},
]
WAITS: dict[str, Any] = {"phase": "Pending", "waiting_reason": "ContainerCreating", "node": "gpu-1"}


@pytest.mark.parametrize(
    ("reason", "message", "found", "stalled", "words"),
    [
        pytest.param(
            "CreateContainerConfigError",
            'secret "s3-credentials" not found',
            "SecretMissing",
            True,
            "spec.secrets.objectStorage: found no Secret 's3-credentials' in namespace 'team'",
            id="object-storage-secret",
        ),
        pytest.param(
            "CreateContainerConfigError",
            'secret "hf-token" not found',
            "SecretMissing",
            True,
            "spec.secrets.huggingFace",
            id="hub-secret",
        ),
        pytest.param(
            "CreateContainerConfigError",
            "couldn't find key AWS_ACCESS_KEY_ID in Secret team/s3-credentials",
            "SecretMissing",
            True,
            "spec.secrets.objectStorage: couldn't find key AWS_ACCESS_KEY_ID",
            id="key-of-a-secret",
        ),
        pytest.param(
            "CreateContainerConfigError",
            'secret "mine" not found',
            "SecretMissing",
            True,
            "spec.podTemplate",
            id="secret-of-the-pod-template",
        ),
        pytest.param(
            "CreateContainerConfigError",
            'configmap "x" not found',
            "InvalidPodConfig",
            True,
            "configmap",
            id="config-map",
        ),
        pytest.param("ImagePullBackOff", "no such image", "ImagePullFailed", True, "no such image", id="image-pull"),
        pytest.param("ErrImageNeverPull", "", "ImagePullFailed", True, "ErrImageNeverPull", id="image-never"),
        pytest.param("RunContainerError", "no runtime", "ContainerNotStarted", True, "no runtime", id="runtime"),
    ],
)
def test_what_keeps_a_container_from_starting(reason: str, message: str, found: str, stalled: bool, words: str) -> None:
    pod = member(phase="Pending", waiting_reason=reason, waiting_message=message)
    problem = startup_problem([pod], SPEC, "team")
    assert problem is not None
    assert (problem.reason, problem.stalled) == (found, stalled)
    assert words in problem.message


def test_an_unschedulable_worker_is_not_stalled_and_the_schedulers_words_are_told() -> None:
    pods = [member(0), member(1, phase="Pending", unschedulable="0/2 nodes: Insufficient nvidia.com/gpu")]
    problem = startup_problem(pods, SPEC, "team")
    assert problem is not None
    assert (problem.reason, problem.stalled) == ("Unschedulable", False)
    assert "run-train-1" in problem.message
    assert "Insufficient nvidia.com/gpu" in problem.message


def test_what_the_user_must_mend_is_told_before_what_may_pass() -> None:
    pods = [
        member(0, phase="Pending", unschedulable="no room"),
        member(1, phase="Pending", waiting_reason="ErrImagePull"),
    ]
    problem = startup_problem(pods, SPEC, "team")
    assert problem is not None
    assert problem.reason == "ImagePullFailed"


def test_a_pod_held_back_by_a_queue_is_not_stalled_and_says_so() -> None:
    problem = startup_problem(
        [member(phase="Pending", scheduling_gated="Scheduling is blocked due to non-empty scheduling gates")],
        SPEC,
        "team",
    )
    assert problem is not None
    assert (problem.reason, problem.stalled) == ("SchedulingGated", False)
    assert (
        problem.message
        == "pod run-train-0 waits for its queue: Scheduling is blocked due to non-empty scheduling gates"
    )


@pytest.mark.parametrize(
    ("claim", "state", "field"),
    [
        pytest.param("pets", "not found", "spec.data.train.pets.annotation", id="a-source"),
        pytest.param("models", "not found", "spec.podTemplate.volumes[2]", id="a-volume"),
        pytest.param("pets", "is being deleted", "spec.data.train.pets.annotation", id="a-claim-that-goes"),
        pytest.param("pet", "not found", "spec.podTemplate.volumes", id="of-an-admission-webhook"),
    ],
)
def test_a_missing_claim_names_its_field(claim: str, state: str, field: str) -> None:
    spec = a_run(data=PVC, podTemplate={"volumes": VOLUMES}).spec
    words = f'0/2 nodes are available: persistentvolumeclaim "{claim}" {state}. preemption: 0/2 nodes are available'
    problem = startup_problem([member(phase="Pending", unschedulable=words)], spec, "team")
    assert problem is not None
    assert (problem.reason, problem.stalled) == ("ClaimMissing", True)
    assert problem.message.startswith(f"{field}: PersistentVolumeClaim {claim!r} of namespace 'team' {state}; ")


def test_a_claim_that_waits_for_its_volume_is_waited_for() -> None:
    words = "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims"
    problem = startup_problem([member(phase="Pending", unschedulable=words)], SPEC, "team")
    assert problem is not None
    assert (problem.reason, problem.stalled) == ("Unschedulable", False)


def test_a_run_goes_on_when_its_claim_exists() -> None:
    world = World(data=PVC)
    words = 'persistentvolumeclaim "pets" not found'
    missing = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}]
    world.server.set_pod("run-preflight-0", {"phase": "Pending", "conditions": missing})
    world.operator.settle()
    assert world.status["phase"] == "Stalled"
    assert world.server.condition("Stalled")["reason"] == "ClaimMissing"
    world.server.set_pod("run-preflight-0", {"phase": "Pending", "conditions": []})
    world.operator.settle()
    assert world.server.condition("Stalled")["status"] == "False"
    world.pass_stage("preflight")
    assert world.status["attempt"] == 1


@pytest.mark.parametrize("waiting", ["", "ContainerCreating", "PodInitializing"])
def test_ordinary_waiting_is_no_problem(waiting: str) -> None:
    assert startup_problem([member(phase="Pending", waiting_reason=waiting)], SPEC, "team") is None


SINCE = text(NOW - timedelta(seconds=30))


@pytest.mark.parametrize(
    ("pod", "reason", "words"),
    [
        pytest.param(
            {"ready_to_start": False}, "SandboxNotReady", f"has had no volumes or network since {SINCE};", id="1.34"
        ),
        pytest.param(
            {"ready_to_start": False, "ready_to_start_message": "no pod sandbox exists"},
            "SandboxNotReady",
            f"has had no volumes or network since {SINCE} (no pod sandbox exists)",
            id="1.37",
        ),
        pytest.param(
            {"ready_to_start": True},
            "ImagePulling",
            f"has been pulling its image since {SINCE}; volumes and network are ready",
            id="an-image",
        ),
    ],
)
def test_a_pod_that_takes_long_says_what_it_waits_for(pod: Raw, reason: str, words: str) -> None:
    pods = [member(0), member(1, **WAITS, start_time=NOW - timedelta(seconds=30), **pod)]
    found = slow_start(pods, a_run().spec, NOW)
    assert found is not None
    assert (found.reason, found.stalled) == (reason, False)
    assert "pod run-train-1 on node gpu-1 has" in found.message
    assert words in found.message
    assert slow_start(pods, a_run().spec, NOW - timedelta(seconds=1)) is None, "as every pod for a moment"
    assert seconds_to_notice(pods, NOW - timedelta(seconds=1)) == 1


def test_what_the_run_mounts_is_named() -> None:
    spec = a_run(data=PVC, podTemplate={"volumes": VOLUMES}).spec
    pod = member(**WAITS, ready_to_start=False, start_time=NOW - timedelta(minutes=1))
    found = slow_start([pod], spec, NOW)
    assert found is not None
    mounted = "PersistentVolumeClaim pets, Secret team-ca, ConfigMap words and PersistentVolumeClaim models"
    assert f"; check that {mounted} exist; " in found.message
    assert "`kubectl describe pod run-train-0` shows the reason" in found.message


def test_the_one_thing_that_it_mounts_is_named() -> None:
    spec = a_run(podTemplate={"volumes": [{"name": "extra", "configMap": {"name": "words"}}]}).spec
    found = slow_start([member(**WAITS, ready_to_start=False, start_time=NOW - timedelta(minutes=1))], spec, NOW)
    assert found is not None
    assert "; check that ConfigMap words exists; " in found.message


@pytest.mark.parametrize(
    "pod",
    [
        pytest.param({"ready_to_start": None}, id="a-kubelet-that-does-not-tell"),
        pytest.param({"ready_to_start": False, "phase": "Running"}, id="running"),
        pytest.param({"ready_to_start": False, "start_time": None}, id="no-kubelet-has-it"),
        pytest.param({"ready_to_start": True, "waiting_reason": "ErrImagePull"}, id="known-already"),
    ],
)
def test_others_say_nothing(pod: Raw) -> None:
    fields = WAITS | {"start_time": NOW - timedelta(hours=1)} | pod
    assert slow_start([member(**fields)], a_run().spec, NOW) is None


def test_it_is_told_once_and_again_when_time_is_up() -> None:
    world = World(runPolicy={"startDeadlineSeconds": 300})
    status = {
        "phase": "Pending",
        "startTime": text(world.server.now),
        "conditions": [
            {"type": "PodReadyToStartContainers", "status": "False", "message": "no pod sandbox exists"},
            {"type": "PodScheduled", "status": "True"},
        ],
        "containerStatuses": [{"name": "trainer", "state": {"waiting": {"reason": "ContainerCreating"}}}],
    }
    place(world, "run-preflight-0", status)
    assert world.server.condition("Reconciling")["reason"] == "PreflightStarting"
    assert world.operator.requeue == 30
    world.later(30)
    assert world.server.condition("Reconciling")["reason"] == "SandboxNotReady"
    written = len(world.server.writes)
    world.later(200)
    assert len(world.server.writes) == written
    world.later(70)
    stalled = world.server.condition("Stalled")
    assert stalled["reason"] == "StartDeadlineExceeded"
    assert "it has no volumes or network (no pod sandbox exists)" in stalled["message"]

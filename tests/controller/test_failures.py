"""Why a group ended, and what follows: one table for a member alone, one for the group."""

from typing import Any

import pytest
from controller.builders import NOW, at, member, result
from internvl_api.spec import Secrets
from internvl_api.status import StageResult
from internvl_operator.core.failures import Outcome, classify, diagnose, trouble, undecided
from internvl_operator.core.observe import Pod


def ended(code: int, rank: int = 0, **fields: Any) -> Pod:
    return member(rank, phase="Succeeded" if code == 0 else "Failed", exit_code=code, **fields)


def said(outcome: str, reason: str, message: str) -> StageResult:
    return StageResult.model_validate(result("train", outcome, reason, message=message))


DELETED = {"deleted_at": NOW}


@pytest.mark.parametrize(
    ("pod", "kind", "budget", "reason", "words"),
    [
        pytest.param(ended(65), "stall", "none", "UserError", "exit code 65", id="user-error"),
        pytest.param(ended(78), "stall", "none", "InvalidRunConfig", "exit code 78", id="config"),
        pytest.param(ended(77), "stall", "none", "AccessDenied", "exit code 77", id="access-denied"),
        pytest.param(ended(69), "stall", "none", "Unavailable", "exit code 69", id="unavailable"),
        pytest.param(
            ended(65, result=said("failed", "ImageMissing", "train.jsonl:3: no photo.jpg")),
            "stall",
            "none",
            "ImageMissing",
            "train.jsonl:3: no photo.jpg",
            id="the-trainers-own-reason-and-words",
        ),
        pytest.param(ended(75), "resume", "none", "Resume", "saved its state", id="resume"),
        pytest.param(ended(75, **DELETED), "resume", "none", "Resume", "saved its state", id="drained-and-saved"),
        pytest.param(
            ended(1, last_words="Traceback …"), "retry", "user", "WorkerFailed", "exit code 1: Trace", id="crash"
        ),
        pytest.param(
            ended(1, result=said("failed", "LossIsNaN", "step 7")),
            "retry",
            "user",
            "LossIsNaN",
            "step 7",
            id="named-crash",
        ),
        pytest.param(ended(137, exit_reason="OOMKilled"), "retry", "user", "OutOfMemory", "more memory", id="oom"),
        pytest.param(ended(137), "retry", "user", "WorkerFailed", "SIGKILL", id="killed"),
        pytest.param(ended(139), "retry", "user", "WorkerFailed", "SIGSEGV", id="segmentation-fault"),
        pytest.param(member(phase="Failed"), "retry", "user", "WorkerFailed", "failed", id="failed-without-exit-code"),
        pytest.param(member(**DELETED), "retry", "infrastructure", "WorkerDeleted", "was deleted", id="deleted"),
        pytest.param(
            ended(143, **DELETED), "retry", "infrastructure", "WorkerDeleted", "was deleted", id="deleted-sigterm"
        ),
        pytest.param(
            member(phase="Failed", pod_reason="Evicted", pod_message="node low on disk"),
            "retry",
            "infrastructure",
            "Evicted",
            "node low on disk",
            id="evicted",
        ),
        pytest.param(
            member(disrupted="PreemptionByScheduler"),
            "retry",
            "infrastructure",
            "Disrupted",
            "PreemptionByScheduler",
            id="preempted",
        ),
        pytest.param(
            ended(137, pod_reason="NodeLost"), "retry", "infrastructure", "NodeLost", "NodeLost", id="node-lost"
        ),
        pytest.param(member(phase="Unknown"), "retry", "infrastructure", "NodeLost", "its node", id="node-unreachable"),
        pytest.param(ended(255), "retry", "infrastructure", "NodeLost", "its node", id="node-restarted"),
        pytest.param(
            ended(137, exit_reason="ContainerStatusUnknown"),
            "retry",
            "infrastructure",
            "NodeLost",
            "ContainerStatusUnknown",
            id="container-status-unknown",
        ),
        pytest.param(
            member(phase="Failed", pod_reason="OutOfnvidia.com/gpu"),
            "retry",
            "infrastructure",
            "OutOfnvidiaComGpu",
            "OutOfnvidia",
            id="kubelet-refused",
        ),
    ],
)
def test_diagnosis_of_one_member(pod: Pod, kind: str, budget: str, reason: str, words: str) -> None:
    outcome = diagnose(pod)
    assert outcome is not None
    assert (outcome.kind, outcome.budget, outcome.reason) == (kind, budget, reason)
    assert words in outcome.message


@pytest.mark.parametrize(
    "pod",
    [
        pytest.param(member(), id="running"),
        pytest.param(member(phase="Pending", unschedulable="no GPU"), id="pending"),
        pytest.param(ended(0), id="succeeded"),
        pytest.param(ended(0, **DELETED), id="succeeded-then-deleted"),
        pytest.param(ended(0, disrupted="EvictionByEvictionAPI"), id="succeeded-while-evicted"),
    ],
)
def test_nothing_is_wrong_with(pod: Pod) -> None:
    assert diagnose(pod) is None


RETRY_USER, RETRY_INFRASTRUCTURE = ("retry", "user"), ("retry", "infrastructure")


@pytest.mark.parametrize(
    ("pods", "expected"),
    [
        pytest.param([member(0), member(1)], None, id="both-run"),
        pytest.param([ended(0, 0), member(1)], None, id="one-is-done"),
        pytest.param([ended(0, 0), ended(0, 1)], ("succeeded", "none"), id="both-are-done"),
        pytest.param([member(0)], RETRY_INFRASTRUCTURE, id="one-is-missing"),
        pytest.param([], RETRY_INFRASTRUCTURE, id="all-are-missing"),
        pytest.param([ended(0, 0)], RETRY_INFRASTRUCTURE, id="one-is-done-the-other-missing"),
        pytest.param([ended(1, 0), member(1)], RETRY_USER, id="one-failed"),
        pytest.param([ended(1, 0), member(1, **DELETED)], RETRY_INFRASTRUCTURE, id="deleted-and-its-peer-failed"),
        pytest.param([ended(1, 0), ended(65, 1)], ("stall", "none"), id="mistake-and-its-peer-failed"),
        pytest.param([ended(1, 0), ended(75, 1)], ("resume", "none"), id="saved-and-its-peer-failed"),
        pytest.param([ended(75, 0), member(1, **DELETED)], RETRY_INFRASTRUCTURE, id="saved-and-its-peer-deleted"),
        pytest.param([ended(65, 0), member(1, **DELETED)], ("stall", "none"), id="mistake-and-its-peer-deleted"),
    ],
)
def test_the_gravest_diagnosis_is_the_groups(pods: list[Pod], expected: tuple[str, str] | None) -> None:
    outcome = classify(pods, expected=2)
    assert (outcome and (outcome.kind, outcome.budget)) == expected


def test_missing_workers_are_named() -> None:
    outcome = classify([member(1)], expected=8)
    assert outcome == Outcome(
        "retry", "WorkerLost", "worker 0, 2, 3, 4, 5 and 2 more of 8 disappeared", "infrastructure"
    )


@pytest.mark.parametrize(
    ("ended_at", "peer_runs", "seconds"),
    [
        pytest.param(at(0), True, 5.0, id="just-now"),
        pytest.param(at(-3), True, 2.0, id="three-seconds-ago"),
        pytest.param(at(-5), True, 0.0, id="long-enough"),
        pytest.param(at(3600), True, 0.0, id="the-nodes-clock-is-ahead"),
        pytest.param(None, True, 0.0, id="no-time-known"),
        pytest.param(at(0), False, 0.0, id="nobody-left-to-wait-for"),
    ],
)
def test_how_long_the_peers_of_a_failed_worker_are_waited_for(ended_at: Any, peer_runs: bool, seconds: float) -> None:
    pods = [ended(1, 0, exit_at=ended_at), member(1) if peer_runs else ended(1, 1, exit_at=ended_at)]
    assert undecided(pods, NOW, 5.0) == seconds


SECRETS = Secrets(object_storage="s3-credentials", hugging_face="hf-token")


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
    problem = trouble([pod], SECRETS, "team")
    assert problem is not None
    assert (problem.reason, problem.stalled) == (found, stalled)
    assert words in problem.message


def test_an_unschedulable_worker_is_not_stalled_and_the_schedulers_words_are_told() -> None:
    pods = [member(0), member(1, phase="Pending", unschedulable="0/2 nodes: Insufficient nvidia.com/gpu")]
    problem = trouble(pods, SECRETS, "team")
    assert problem is not None
    assert (problem.reason, problem.stalled) == ("Unschedulable", False)
    assert "run-train-1" in problem.message
    assert "Insufficient nvidia.com/gpu" in problem.message


def test_what_the_user_must_mend_is_told_before_what_may_pass() -> None:
    pods = [
        member(0, phase="Pending", unschedulable="no room"),
        member(1, phase="Pending", waiting_reason="ErrImagePull"),
    ]
    problem = trouble(pods, SECRETS, "team")
    assert problem is not None
    assert problem.reason == "ImagePullFailed"


@pytest.mark.parametrize("waiting", ["", "ContainerCreating", "PodInitializing"])
def test_ordinary_waiting_is_no_trouble(waiting: str) -> None:
    assert trouble([member(phase="Pending", waiting_reason=waiting)], SECRETS, "team") is None

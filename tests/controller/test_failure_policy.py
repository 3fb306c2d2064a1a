"""Why a group ended, and what follows: one table for a member alone, one for the group."""

from typing import Any

import pytest
from controller.builders import NOW, at, member, result
from internvl_api.status import StageResult
from internvl_operator.core.observe import Pod
from internvl_operator.core.policies.failure_policy import classify, diagnose, seconds_to_settle
from internvl_operator.core.policies.outcome import Outcome


def ended(code: int, rank: int = 0, **fields: Any) -> Pod:
    return member(rank, phase="Succeeded" if code == 0 else "Failed", exit_code=code, **fields)


def said(outcome: str, reason: str, message: str) -> StageResult:
    return StageResult.model_validate(result("train", outcome, reason, message=message))


DELETED = {"deletion_timestamp": NOW}
OWN_DISK = 'Usage of EmptyDir volume "x" exceeds the limit "1Gi".'


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
        pytest.param(ended(75, **DELETED), "resume", "none", "Resume", "saved its state", id="deleted-and-saved"),
        pytest.param(
            ended(75, disruption_reason="EvictionByEvictionAPI", **DELETED),
            "resume",
            "none",
            "Drained",
            "saved its state and exited because of: EvictionByEvictionAPI",
            id="drained-and-saved",
        ),
        pytest.param(
            ended(
                75,
                disruption_reason="PreemptionByScheduler",
                disruption_message="default-scheduler: preempting",
                **DELETED,
            ),
            "resume",
            "none",
            "Preempted",
            "saved its state and exited because of: default-scheduler: preempting",
            id="preempted-and-saved",
        ),
        pytest.param(
            ended(
                75,
                disruption_reason="TerminationByKubelet",
                pod_reason="Terminated",
                pod_message="imminent node shutdown.",
            ),
            "resume",
            "none",
            "NodeShutdown",
            "saved its state and exited because of: imminent node shutdown.",
            id="node-shut-down-and-saved",
        ),
        pytest.param(
            ended(1, termination_message="Traceback …"),
            "retry",
            "user",
            "WorkerFailed",
            "exit code 1: Trace",
            id="crash",
        ),
        pytest.param(
            ended(1, result=said("failed", "DiskFull", "/scratch is full")),
            "retry",
            "user",
            "DiskFull",
            "/scratch is full",
            id="disk-full",
        ),
        pytest.param(
            ended(65, result=said("failed", "LossNotFinite", "the loss is nan at step 7")),
            "fail",
            "none",
            "LossNotFinite",
            "at step 7",
            id="loss-is-no-number",
        ),
        pytest.param(
            ended(1, result=said("failed", "GpuOutOfMemory", "tried to allocate 2 GiB")),
            "change",
            "none",
            "GpuOutOfMemory",
            "2 GiB",
            id="gpu-out-of-memory",
        ),
        pytest.param(
            ended(1, node="gpu-7", result=said("failed", "GpuHardwareError", "rank 3: uncorrectable ECC error")),
            "retry",
            "infrastructure",
            "GpuHardwareError",
            "worker 0 (pod run-train-0) on node gpu-7: rank 3: uncorrectable ECC error",
            id="broken-gpu",
        ),
        pytest.param(
            ended(134, node=None, result=said("failed", "GpuFault", "illegal memory access")),
            "retry",
            "infrastructure",
            "GpuFault",
            "worker 0 (pod run-train-0): illegal memory access",
            id="aborted-after-a-fault-of-its-gpu",
        ),
        pytest.param(
            ended(1, result=said("failed", "RdmaRegistrationFailed", "ibv_reg_mr: Cannot allocate memory")),
            "retry",
            "infrastructure",
            "RdmaRegistrationFailed",
            "ibv_reg_mr",
            id="memory-that-the-network-card-cannot-register",
        ),
        pytest.param(
            ended(1, result=said("failed", "NetworkFault", "IBV_WC_RETRY_EXC_ERR")),
            "retry",
            "infrastructure",
            "NetworkFault",
            "IBV_WC",
            id="network",
        ),
        pytest.param(
            ended(1, result=said("failed", "DeviceAssertFailed", "index out of range")),
            "retry",
            "user",
            "DeviceAssertFailed",
            "index out of range",
            id="index-out-of-range-in-a-kernel",
        ),
        pytest.param(
            ended(1, result=said("failed", "OutputLeaseLost", "attempt 3 has taken s3://models/pets")),
            "retry",
            "infrastructure",
            "OutputLeaseLost",
            "attempt 3 has taken",
            id="replaced-by-a-later-attempt",
        ),
        pytest.param(
            ended(65, result=said("failed", "OutputInUse", "run team-a/cats is writing to s3://models/pets")),
            "stall",
            "none",
            "OutputInUse",
            "team-a/cats is writing",
            id="another-run-writes-to-the-output",
        ),
        pytest.param(
            ended(1, result=said("failed", "PeerLost", "gone")),
            "retry",
            "infrastructure",
            "PeerLost",
            "gone",
            id="lost-its-peer",
        ),
        pytest.param(
            ended(69, result=said("failed", "RendezvousTimeout", "could not resolve")),
            "retry",
            "infrastructure",
            "RendezvousTimeout",
            "could not resolve",
            id="rendezvous",
        ),
        pytest.param(ended(134), "retry", "infrastructure", "WorkerAborted", "SIGABRT", id="aborted-by-the-watchdog"),
        pytest.param(
            ended(70, result=said("failed", "EvaluationBelowThreshold", "CIDEr 0.9")),
            "fail",
            "none",
            "EvaluationBelowThreshold",
            "CIDEr 0.9",
            id="rejected",
        ),
        pytest.param(
            ended(128, exit_reason="StartError", termination_message='exec: "internvl-trainer": not found'),
            "stall",
            "none",
            "ContainerNotStarted",
            "not found",
            id="nothing-to-run-in-the-image",
        ),
        pytest.param(
            ended(137, exit_reason="OOMKilled"), "retry", "user", "OutOfMemory", "ran out of memory", id="oom"
        ),
        pytest.param(ended(137), "retry", "user", "WorkerKilled", "SIGKILL", id="killed"),
        pytest.param(ended(139), "retry", "user", "WorkerKilled", "SIGSEGV", id="segmentation-fault"),
        pytest.param(member(**DELETED), "retry", "infrastructure", "WorkerDeleted", "was deleted", id="deleted"),
        pytest.param(
            ended(143, **DELETED), "retry", "infrastructure", "WorkerDeleted", "was deleted", id="deleted-sigterm"
        ),
        pytest.param(
            member(
                phase="Failed",
                pod_reason="Evicted",
                pod_message="node low on disk",
                disruption_reason="TerminationByKubelet",
            ),
            "retry",
            "infrastructure",
            "Evicted",
            "node low on disk",
            id="evicted",
        ),
        pytest.param(
            member(disruption_reason="PreemptionByScheduler", **DELETED),
            "resume",
            "none",
            "Preempted",
            "was preempted: PreemptionByScheduler",
            id="preempted",
        ),
        pytest.param(
            ended(143, disruption_reason="EvictionByEvictionAPI", **DELETED),
            "resume",
            "none",
            "Drained",
            "was drained: EvictionByEvictionAPI",
            id="drained",
        ),
        pytest.param(
            ended(
                143, disruption_reason="EvictionByEvictionAPI", disruption_message="Eviction API: evicting", **DELETED
            ),
            "resume",
            "none",
            "Drained",
            "was drained: EvictionByEvictionAPI: Eviction API: evicting",
            id="drained-in-the-words-of-the-eviction",
        ),
        pytest.param(
            member(disruption_reason="KueueEviction"), "resume", "none", "Preempted", "Kueue", id="evicted-by-its-queue"
        ),
        pytest.param(
            member(phase="Failed", pod_reason="Preempting"), "resume", "none", "Preempted", "Preempting", id="kubelet"
        ),
        pytest.param(
            member(disruption_reason="DeletionByTaintManager", **DELETED),
            "retry",
            "infrastructure",
            "NodeTainted",
            "DeletionByTaintManager",
            id="tainted-node",
        ),
        pytest.param(
            member(disruption_reason="DeletionByPodGC", disruption_message="PodGC: node no longer exists", **DELETED),
            "retry",
            "infrastructure",
            "NodeLost",
            "PodGC: node no longer exists",
            id="node-deleted",
        ),
        pytest.param(
            member(disruption_reason="TerminationByKubelet", disruption_message="The node was low on resource: memory"),
            "retry",
            "infrastructure",
            "Disrupted",
            "low on resource: memory",
            id="ended-by-its-kubelet",
        ),
        pytest.param(
            member(phase="Failed", pod_reason="Evicted", pod_message=OWN_DISK),
            "retry",
            "user",
            "DiskFull",
            "EmptyDir",
            id="outgrew-its-own-disk",
        ),
        pytest.param(
            ended(75, pod_reason="Evicted", pod_message=OWN_DISK, disruption_reason="TerminationByKubelet"),
            "retry",
            "user",
            "DiskFull",
            "EmptyDir",
            id="outgrew-its-own-disk-and-saved",
        ),
        pytest.param(
            member(phase="Failed", pod_reason="Terminated", pod_message="node shutdown"),
            "retry",
            "infrastructure",
            "NodeShutdown",
            "node shutdown",
            id="node-shutdown",
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
            member(phase="Failed"),
            "retry",
            "infrastructure",
            "NodeLost",
            "was lost with its node",
            id="failed-without-a-word-on-its-container",
        ),
        pytest.param(
            member(phase="Failed", pod_reason="OutOfnvidia.com/gpu"),
            "retry",
            "infrastructure",
            "NodeRefused",
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
        pytest.param(ended(0, disruption_reason="EvictionByEvictionAPI"), id="succeeded-while-evicted"),
    ],
)
def test_nothing_is_wrong_with(pod: Pod) -> None:
    assert diagnose(pod) is None


LOST_PEER = ended(1, 0, result=said("failed", "PeerLost", "gone"))
OUTGREW_DISK = ended(75, 0, pod_reason="Evicted", pod_message=OWN_DISK, disruption_reason="TerminationByKubelet")
FULL_GPU = ended(1, 1, result=said("failed", "GpuOutOfMemory", "full"))
BROKEN_GPU = ended(1, 0, result=said("failed", "GpuHardwareError", "ECC"))
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
        pytest.param([OUTGREW_DISK, ended(75, 1)], RETRY_USER, id="outgrew-its-disk-and-its-peer-saved"),
        pytest.param(
            [OUTGREW_DISK, member(1, **DELETED)], RETRY_INFRASTRUCTURE, id="outgrew-its-disk-and-peer-deleted"
        ),
        pytest.param([ended(75, 0), member(1, **DELETED)], RETRY_INFRASTRUCTURE, id="saved-and-its-peer-deleted"),
        pytest.param([ended(65, 0), member(1, **DELETED)], ("stall", "none"), id="mistake-and-its-peer-deleted"),
        pytest.param([LOST_PEER, ended(1, 1)], RETRY_USER, id="a-crash-and-who-heard-of-it"),
        pytest.param([LOST_PEER, FULL_GPU], ("change", "none"), id="a-full-gpu-and-who-heard-of-it"),
        pytest.param([LOST_PEER, ended(75, 1)], ("resume", "none"), id="saved-and-who-heard-of-it"),
        pytest.param([LOST_PEER, member(1)], RETRY_INFRASTRUCTURE, id="only-who-heard-of-it"),
        pytest.param([FULL_GPU, member(0, **DELETED)], ("change", "none"), id="a-full-gpu-and-its-peer-deleted"),
        pytest.param([BROKEN_GPU, FULL_GPU], ("change", "none"), id="a-full-gpu-and-a-broken-one"),
        pytest.param([BROKEN_GPU, ended(75, 1)], RETRY_INFRASTRUCTURE, id="a-broken-gpu-and-its-peer-saved"),
        pytest.param([BROKEN_GPU, ended(1, 1)], RETRY_INFRASTRUCTURE, id="a-broken-gpu-and-its-peer-failed"),
    ],
)
def test_the_gravest_diagnosis_is_the_groups(pods: list[Pod], expected: tuple[str, str] | None) -> None:
    outcome = classify(pods, expected=2)
    assert (outcome and (outcome.kind, outcome.budget)) == expected


def test_who_aborted_is_named_rather_than_who_heard_of_it() -> None:
    outcome = classify([LOST_PEER, ended(134, 1)], expected=2)
    assert outcome is not None
    assert outcome.reason == "WorkerAborted"


def test_the_node_that_shuts_down_is_named_rather_than_the_peer_that_stopped_with_it() -> None:
    stopped = ended(75, 0)
    shut_down = ended(75, 1, pod_reason="Terminated", pod_message="imminent node shutdown.")
    outcome = classify([stopped, shut_down], expected=2)
    assert outcome is not None
    assert (outcome.kind, outcome.reason) == ("resume", "NodeShutdown")


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
    pods = [ended(1, 0, finished_at=ended_at), member(1) if peer_runs else ended(1, 1, finished_at=ended_at)]
    assert seconds_to_settle(pods, NOW, 5.0) == seconds

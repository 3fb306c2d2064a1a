"""What keeps a group from starting, in words a user can act on."""

import pytest
from controller.builders import member
from internvl_api.spec import Secrets
from internvl_operator.core.policies.startup_problems import trouble

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


def test_a_pod_held_back_by_a_queue_is_not_stalled_and_says_so() -> None:
    problem = trouble(
        [member(phase="Pending", gated="Scheduling is blocked due to non-empty scheduling gates")], SECRETS, "team"
    )
    assert problem is not None
    assert (problem.reason, problem.stalled) == ("SchedulingGated", False)
    assert (
        problem.message
        == "pod run-train-0 waits for its queue: Scheduling is blocked due to non-empty scheduling gates"
    )


@pytest.mark.parametrize("waiting", ["", "ContainerCreating", "PodInitializing"])
def test_ordinary_waiting_is_no_trouble(waiting: str) -> None:
    assert trouble([member(phase="Pending", waiting_reason=waiting)], SECRETS, "team") is None

"""What users see of runs that end, and what they do with ended runs, on two real nodes."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from typing import Any

import pytest
from e2e.harness import ChildLog, Platform, condition, trains
from internvl_api.constants import ALREADY_PUBLISHED
from internvl_api.status import InternVLFineTuneStatus
from ivft_cluster.shell import wait_for
from ivft_demo.results import list_keys, read_object
from kubernetes import client

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("holds")]

ALONE: dict[str, Any] = {"workers": 1, "training": {"maxSteps": 4, "epochs": 2, "globalBatchSize": 4}}
SOON_DELETED = ALONE | {"runPolicy": {"ttlSecondsAfterFinished": 3}}
COMPLETE = {"workers": 1, "training": {"maxSteps": 4, "epochs": 2, "globalBatchSize": 8}}
NEVER_PLACED = {"podTemplate": {"nodeSelector": {"disk": "none"}}, "runPolicy": {"activeDeadlineSeconds": 3}}
LIMIT = "3Gi"
OUT_OF_MEMORY = {
    "workers": 1,
    "training": {"maxSteps": 20000, "epochs": 4000, "globalBatchSize": 4},
    "podTemplate": {
        "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": LIMIT}},
        "shmSize": "4Gi",
    },
    "runPolicy": {"backoffLimit": 0},
}
# The kernel cannot reclaim files in memory, so it ends the largest process of the container: the training process.
FILL_SHARED_MEMORY = """
with open("/dev/shm/full", "wb") as file:
    for _ in range(3 << 10):
        file.write(bytes(1 << 20))
"""


@pytest.fixture(scope="module", autouse=True)
def begun(platform: Platform, child_log: ChildLog) -> None:
    """All runs at once, because each of them mostly waits."""
    platform.apply("quickstart", "soon-deleted", **SOON_DELETED)
    platform.apply("quickstart", "complete", **COMPLETE)
    platform.apply("quickstart", "never-placed", **NEVER_PLACED)
    platform.apply("quickstart", "ran-out", **OUT_OF_MEMORY)


def is_complete(status: InternVLFineTuneStatus) -> bool:
    return bool(condition(status, "Complete"))


def deleted_by_itself(platform: Platform, name: str) -> None:
    """Wait until the operator has deleted a run whose time to live is over, and its children are gone."""
    with pytest.raises(AssertionError, match=r"was deleted|does not exist"):
        platform.wait(name, "deleted", lambda status: False)
    wait_for("no child is left", lambda: not platform.children(name), timeout=120)


def test_a_run_that_its_time_to_live_deletes_is_recognised_when_it_is_applied_again(
    platform: Platform, child_log: ChildLog
) -> None:
    """As a GitOps tool does, which applies what git has and the cluster lacks."""
    deleted_by_itself(platform, "soon-deleted")
    output = platform.apply("quickstart", "soon-deleted", **SOON_DELETED)
    again = platform.wait("soon-deleted", "complete", is_complete)
    (ready,) = [each for each in again.conditions if each.type == "Ready"]
    assert (ready.status, ready.reason) == ("True", ALREADY_PUBLISHED)
    assert output in ready.message
    assert [(stage.name, stage.state) for stage in again.stages] == [
        ("preflight", "Succeeded"),
        ("train", "Skipped"),
        ("publish", "Skipped"),
    ]
    assert again.artifacts, "status names the artifacts that were published before"
    for uri in again.artifacts.values():
        assert list_keys(platform.s3, uri) or read_object(platform.s3, uri)
    deleted_by_itself(platform, "soon-deleted")
    made = child_log.of("soon-deleted")
    pods = {stage: made["Pod", f"soon-deleted-{stage}-0"] for stage in ("preflight", "train", "publish")}
    assert pods == {"preflight": 2, "train": 1, "publish": 1}, "nothing is trained twice"


def test_wait_returns_at_both_ends_with_an_exit_code_for_each(platform: Platform) -> None:
    failed = platform.kubectl_ivft("wait", "never-placed")
    assert failed.returncode == 3, failed
    assert "spec.runPolicy.activeDeadlineSeconds" in failed.stdout
    succeeded = platform.kubectl_ivft("wait", "complete")
    assert succeeded.returncode == 0, succeeded


def test_the_status_fits_a_file_or_a_pipe(platform: Platform) -> None:
    status = platform.kubectl_ivft("status", "never-placed").stdout.splitlines()
    listed = platform.kubectl_ivft("list").stdout.splitlines()
    assert [line for line in listed if line.startswith("never-placed")], "a line for each run, never folded"
    assert any("activeDeadlineSeconds" in line for line in status)
    assert max(len(line) for line in status) <= 120
    assert [line for line in (*status, *listed) if line != line.rstrip()] == [], "no padding"


def test_a_change_of_a_published_run_is_answered(platform: Platform, child_log: ChildLog) -> None:
    before = platform.wait("complete", "complete", is_complete)
    made = child_log.of("complete")
    with pytest.raises(client.ApiException, match="cannot change while it holds this run's checkpoints"):
        platform.change("complete", output="s3://demo/runs/elsewhere")
    platform.change("complete", workers=2)
    told = platform.wait("complete", "told", lambda status: "the spec changed after" in condition(status, "Ready"))
    advice = "to train again, create a new InternVLFineTune with another name and another spec.output"
    assert advice in condition(told, "Ready")
    assert told.artifacts == before.artifacts
    events = wait_for("an event", lambda: [e for e in platform.events("complete") if e.startswith("SpecChangeIgnored")])
    assert advice in events[0]
    assert platform.kubectl_ivft("wait", "complete").returncode == 0
    assert child_log.of("complete") == made, "no pod is made again"


def test_a_worker_that_ran_out_of_memory_is_told_with_figures_and_advice(platform: Platform) -> None:
    platform.wait("ran-out", "training", lambda status: trains(status) and (status.progress.step or 0) > 4)
    fill = ("exec", "-n", platform.namespace, "ran-out-train-0", "--", "python3", "-c", FILL_SHARED_MEMORY)
    with suppress(subprocess.CalledProcessError):  # it may end with the container
        platform.cluster.kubectl(*fill)
    failed = condition(platform.wait("ran-out", "failed", lambda status: status.phase == "Failed"), "Failed")
    assert f"OutOfMemory: worker 0 (pod ran-out-train-0) used more memory than its limit of {LIMIT}" in failed
    assert "it last reported a peak of" in failed
    assert "raise spec.podTemplate.resources.limits.memory" in failed
    why = platform.kubectl_ivft("why", "ran-out")
    assert "raise spec.podTemplate.resources.limits.memory" in why.stdout, why
    logs = platform.kubectl_ivft("logs", "ran-out")
    assert logs.returncode == 0, logs
    assert "ran-out" in logs.stdout or "step" in logs.stdout, logs

"""Raw pods and resources as clusters really show them, and as they should not."""

from typing import Any

import pytest
from controller.builders import NOW, Raw, at, custom_resource, raw_pod, result, terminated, text, waiting
from hypothesis import given
from hypothesis import strategies as st
from internvl_operator.core.observe import read_pod
from internvl_operator.core.run import read_run, read_status


def seen(status: Raw | None = None, **metadata: Any) -> Any:
    raw = raw_pod(status=status)
    raw["metadata"] |= metadata
    return read_pod(raw)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        pytest.param({"phase": "Pending"}, {"phase": "Pending", "active": True, "finished": False}, id="pending"),
        pytest.param(
            {"phase": "Running", "podIP": "10.0.0.1"}, {"running": True, "ip": "10.0.0.1", "active": True}, id="running"
        ),
        pytest.param({"phase": "Succeeded"}, {"finished": True, "succeeded": True}, id="succeeded"),
        pytest.param({"phase": "Failed"}, {"finished": True, "succeeded": False}, id="failed"),
        pytest.param(
            {"phase": "Running", **terminated(0)},
            {"finished": True, "succeeded": True, "running": False},
            id="a-sidecar-still-runs",
        ),
        pytest.param(
            {"phase": "Failed", **terminated(137, reason="OOMKilled", finished=at(7))},
            {"exit_code": 137, "exit_reason": "OOMKilled", "finished_at": at(7), "result": None},
            id="oom",
        ),
        pytest.param(
            {"phase": "Failed", **terminated(1, "Traceback: boom")},
            {"termination_message": "Traceback: boom", "result": None},
            id="words-that-are-no-result",
        ),
        pytest.param(
            {"phase": "Failed", **terminated(1, '{"stage": "tra')},
            {"termination_message": '{"stage": "tra'},
            id="cut-result",
        ),
        pytest.param(
            {"phase": "Pending", **waiting("ImagePullBackOff", "no such image")},
            {"waiting_reason": "ImagePullBackOff", "waiting_message": "no such image"},
            id="image",
        ),
        pytest.param(
            {
                "phase": "Pending",
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"}
                ],
            },
            {"unschedulable": "0/2 nodes"},
            id="unschedulable",
        ),
        pytest.param(
            {
                "phase": "Running",
                "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}],
            },
            {"disruption_reason": "PreemptionByScheduler"},
            id="disrupted",
        ),
        pytest.param(
            {
                "phase": "Pending",
                "conditions": [
                    {"type": "PodReadyToStartContainers", "status": "False", "message": "no pod sandbox exists"}
                ],
            },
            {"ready_to_start": False, "ready_to_start_message": "no pod sandbox exists"},
            id="no-sandbox",
        ),
        pytest.param(
            {"phase": "Pending", "conditions": [{"type": "PodReadyToStartContainers", "status": "True"}]},
            {"ready_to_start": True},
            id="a-sandbox",
        ),
        pytest.param(
            {"phase": "Failed", "reason": "Evicted", "message": "low on memory"},
            {"pod_reason": "Evicted", "pod_message": "low on memory"},
            id="evicted",
        ),
        pytest.param(
            {
                "phase": "Failed",
                "containerStatuses": [{"name": "istio-proxy", "state": {"terminated": {"exitCode": 3}}}],
            },
            {"exit_code": None},
            id="another-container-ended",
        ),
        pytest.param({}, {"phase": "Pending"}, id="nothing-known-yet"),
    ],
)
def test_reading_a_pod(status: Raw, expected: Raw) -> None:
    pod = seen(status)
    assert {name: getattr(pod, name) for name in expected} == expected


def test_a_result_is_read_with_its_parts() -> None:
    checkpoint = {"step": 20, "uri": "s3://out/20", "sha256": "0", "verifiedAt": text(NOW)}
    words = result("train", "resume", "Preempted", checkpoint=checkpoint, progress={"step": 20}, later="unknown")
    pod = seen({"phase": "Failed", **terminated(75, words)})
    assert pod.result.reason == "Preempted"
    assert pod.result.checkpoint.step == pod.result.progress.step == 20


def test_when_a_deleted_pods_grace_ends() -> None:
    assert seen(deletionTimestamp=text(at(120))).deletion_timestamp == at(120)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"labels": {}}, id="no-labels"),
        pytest.param(
            {"labels": {"internvl.dev/attempt": "x", "internvl.dev/node-rank": "0"}}, id="attempt-not-a-number"
        ),
        pytest.param({"labels": {"internvl.dev/attempt": "²", "internvl.dev/node-rank": "0"}}, id="superscript"),
        pytest.param({"ownerReferences": []}, id="nobodys"),
        pytest.param(
            {"ownerReferences": [{"kind": "Job", "name": "run", "uid": "1", "controller": True}]}, id="a-jobs"
        ),
    ],
)
def test_a_stranger_with_our_labels_is_left_out(change: Raw) -> None:
    raw = raw_pod()
    raw["metadata"] |= change
    assert read_pod(raw) is None


@given(st.recursive(st.none() | st.text() | st.integers(), lambda inner: st.dictionaries(st.text(), inner)))
def test_no_termination_message_breaks_reading(value: object) -> None:
    pod = seen({"phase": "Failed", **terminated(1, repr(value))})
    assert pod.exit_code == 1


@pytest.mark.parametrize(
    ("status", "attempt"),
    [
        pytest.param({"attempt": 3, "fromTheFuture": {"a": 1}}, 3, id="unknown-field"),
        pytest.param({"attempt": 3, "stage": "evaluate"}, 3, id="unknown-stage"),
        pytest.param({"attempt": 3, "phase": "Dreaming", "conditions": "none"}, 3, id="unknown-phase-and-type"),
        pytest.param({"attempt": "many"}, 0, id="not-a-number"),
        pytest.param({"attempt": 3, "stages": [{"name": "evaluate"}]}, 3, id="unknown-stage-entry"),
        pytest.param({}, 0, id="empty"),
    ],
)
def test_a_status_written_by_another_version_is_read_in_part(status: Raw, attempt: int) -> None:
    assert read_status(status).attempt == attempt


def test_digests_are_of_the_users_words() -> None:
    run = read_run(custom_resource())
    same = read_run(custom_resource(runPolicy={"suspend": True}))
    other_pod = read_run(custom_resource(podTemplate={"labels": {"a": "b"}}))
    other_run = read_run(custom_resource(workers=4))
    assert (run.run_digest, run.pod_digest) == (same.run_digest, same.pod_digest)
    assert run.run_digest == other_pod.run_digest
    assert run.pod_digest != other_pod.pod_digest
    assert run.run_digest != other_run.run_digest


@pytest.mark.parametrize("spec", [None, "text", [], {}, {"recipe": "no-such-recipe"}])
def test_a_run_with_any_spec_can_be_read(spec: object) -> None:
    run = read_run(custom_resource() | {"spec": spec})
    assert run.resolved.error is not None
    with pytest.raises(type(run.resolved.error)):
        _ = run.spec


@pytest.mark.parametrize("name", ["run-train-1", "run-publish-0", "other-train-0", "mine"])
def test_a_pod_whose_name_is_not_its_labels_is_not_ours(name: str) -> None:
    """Its labels and its owner may have been copied from one that is."""
    pod = raw_pod()
    assert read_pod(pod) is not None
    assert read_pod(pod | {"metadata": pod["metadata"] | {"name": name}}) is None


@pytest.mark.parametrize("strange", ["x", [1], 7, True, None])
def test_parts_of_another_type_count_as_absent(strange: object) -> None:
    raw = custom_resource() | {"spec": strange, "status": strange}
    raw["metadata"] |= {"annotations": strange, "labels": strange}
    run = read_run(raw)
    assert run.mistake is not None
    assert run.status.phase == read_status({}).phase

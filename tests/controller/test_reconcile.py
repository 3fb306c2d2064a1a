"""Single passes: from a status and pods to what is made, deleted and waited for."""

from typing import Any

import pytest
from controller.builders import CONFIG, NOW, Raw, a_run, at, member, text
from internvl_operator.core.observe import Observed, Pod
from internvl_operator.core.plan import Plan
from internvl_operator.core.reconcile import reconcile

DONE = {"name": "preflight", "state": "Succeeded", "attempt": 1}


def training(*, attempt: int = 1, made: int = 1, state: str = "Running", **more: Any) -> Raw:
    """The status of a run whose workers of attempt `made` were all created."""
    entry = {"name": "train", "state": state, "attempt": made, "startedAt": text(at(-60))}
    return {
        "attempt": attempt,
        "stages": [DONE, entry],
        "phase": "Running",
        "observedGeneration": 1,
        "runDigest": a_run().run_digest,
        "startedAt": text(at(-60)),
        **more,
    }


def one_pass(status: Raw | None, *pods: Pod, now: Any = NOW, **changes: Any) -> Plan:
    return reconcile(a_run(status=status, **changes), Observed(pods=pods), now, CONFIG)


def made(plan: Plan) -> list[str]:
    return [child["metadata"]["name"] for child in plan.apply if child["kind"] == "Pod"]


def deleted(plan: Plan) -> list[str]:
    return [ref.name for ref in plan.delete]


def ended(rank: int, code: int = 1, **fields: Any) -> Pod:
    return member(rank, phase="Failed", exit_code=code, finished_at=at(-30), **fields)


@pytest.mark.parametrize(
    ("status", "pods", "makes", "deletes", "attempt", "requeue"),
    [
        pytest.param(None, [], ["run-preflight-0"], [], 1, None, id="a-new-run"),
        pytest.param(training(), [member(0), member(1)], [], [], 1, None, id="all-is-well"),
        pytest.param(training(made=0), [member(0)], ["run-train-1"], [], 1, None, id="creation-was-cut-off"),
        pytest.param(training(), [member(0)], [], ["run-train-0"], 2, 0, id="a-made-worker-is-missing"),
        pytest.param(
            training(failures=1), [ended(0), member(1)], [], ["run-train-1"], 2, 10, id="peers-are-freed-during-a-pause"
        ),
        pytest.param(
            training(attempt=2, retryAt=text(at(7))),
            [ended(0), member(1)],
            [],
            ["run-train-1"],
            2,
            7,
            id="killed-after-the-count-and-before-the-deletion",
        ),
        pytest.param(training(attempt=2), [ended(0)], [], ["run-train-0"], 2, None, id="then-the-failed-pod-goes-too"),
        pytest.param(
            training(attempt=2), [], ["run-train-0", "run-train-1"], [], 2, None, id="then-the-group-is-made-again"
        ),
        pytest.param(
            training(attempt=2),
            [member(0, deletion_timestamp=at(30))],
            [],
            [],
            2,
            90,
            id="a-pod-that-is-leaving-is-waited-for",
        ),
    ],
)
def test_a_pass(
    status: Raw | None, pods: list[Pod], makes: list[str], deletes: list[str], attempt: int, requeue: float | None
) -> None:
    plan = one_pass(status, *pods)
    assert plan.status is not None
    assert (made(plan), deleted(plan)) == (makes, deletes)
    assert (plan.status.attempt, plan.requeue_after) == (attempt, requeue)


def test_a_lost_status_never_leads_to_an_attempt_that_was_already_there() -> None:
    pods = [member(rank, attempt=3) for rank in (0, 1)]
    plan = one_pass(None, *pods)
    # preflight comes first again; the workers of attempt 3 are told to go before anything is made
    assert made(plan) == []
    assert sorted(deleted(plan)) == ["run-train-0", "run-train-1"]
    (pod,) = made(one_pass(plan.status.to_dict() if plan.status else None))
    assert pod == "run-preflight-0"


def test_status_is_the_same_when_nothing_changes() -> None:
    first = one_pass(training(), member(0), member(1))
    assert first.status is not None
    again = one_pass(first.status.to_dict(), member(0), member(1), now=at(500))
    assert again.status == first.status


@pytest.mark.parametrize(
    ("pods", "workers"),
    [
        pytest.param([member(0), member(1)], (2, 0, 0), id="both-run"),
        pytest.param([member(0), member(1, phase="Pending")], (2, 0, 0), id="one-waits"),
        pytest.param([member(0, phase="Succeeded", exit_code=0), member(1)], (1, 1, 0), id="one-is-done"),
        pytest.param([member(0, phase="Failed", exit_code=1, finished_at=NOW), member(1)], (1, 0, 1), id="one-failed"),
    ],
)
def test_workers_are_counted(pods: list[Pod], workers: tuple[int, int, int]) -> None:
    status = one_pass(training(), *pods).status
    assert status is not None
    assert (status.workers.active, status.workers.succeeded, status.workers.failed) == workers


@pytest.mark.parametrize(
    ("pods", "phase", "reason", "words"),
    [
        pytest.param([member(0), member(1)], "Running", "TrainRunning", "2 of 2 workers run", id="running"),
        pytest.param(
            [member(0), member(1, phase="Pending")],
            "Running",
            "TrainEnding",
            "1 of 2 workers run",
            id="one-left-running",
        ),
        pytest.param(
            [member(0), member(1, phase="Pending", unschedulable="no GPU left")],
            "Pending",
            "Unschedulable",
            "no GPU left",
            id="unschedulable",
        ),
        pytest.param(
            [member(0), member(1, phase="Pending", waiting_reason="ErrImagePull", waiting_message="no such image")],
            "Stalled",
            "ImagePullFailed",
            "no such image",
            id="image",
        ),
    ],
)
def test_how_a_group_is_doing_is_told(pods: list[Pod], phase: str, reason: str, words: str) -> None:
    status = one_pass(training(), *pods).status
    assert status is not None
    ready = status.conditions[0]
    assert (status.phase, ready.type, ready.reason) == (phase, "Ready", reason)
    assert words in ready.message


def test_why_the_last_attempt_ended_is_told_until_the_next_one_runs() -> None:
    entry = {"name": "train", "state": "Pending", "attempt": 1, "message": "worker 1 was deleted"}
    status = training(attempt=2, stages=[DONE, entry])
    waiting = one_pass(status, member(1, deletion_timestamp=at(30))).status
    assert waiting is not None
    assert "worker 1 was deleted" in waiting.conditions[0].message
    made_again = one_pass(status).status
    assert made_again is not None
    assert "attempt 2" in made_again.conditions[0].message
    assert "worker 1 was deleted" in made_again.conditions[0].message

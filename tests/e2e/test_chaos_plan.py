"""The plan that a seed draws, and the verdict on a run, without a cluster."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from e2e.chaos_plan import (
    API_SERVER_RESTARTED,
    KINDS,
    LATEST_STEP,
    NODE_LOST,
    OPERATOR_KILLED,
    RENDEZVOUS,
    STEPS,
    STORAGE_STOPPED,
    TRAINER_KILLED,
    WORKER_DELETED,
    Kind,
    plan,
)
from e2e.chaos_verdict import Ending, Product, complaints, differences
from internvl_api.status import Condition, InternVLFineTuneStatus, Progress, Restarts
from ivft_demo.results import Loss


def test_a_seed_always_gives_the_same_plan() -> None:
    assert plan(7, 20) == plan(7, 20)
    assert plan(7, 20) != plan(8, 20)
    assert plan(7, 20)[:9] == plan(7, 9), "a shorter plan is the beginning of a longer one"


@pytest.mark.parametrize("seed", range(20))
def test_each_kind_occurs_and_each_run_is_disturbed_once(seed: int) -> None:
    drawn = plan(seed, 20)
    assert len({each.run for each in drawn}) == 20
    assert {each.kind for each in drawn[: len(KINDS)]} == set(KINDS)
    trained = [each for each in drawn if each.stage == "train"]
    assert all(RENDEZVOUS <= each.step <= LATEST_STEP and each.rank in (0, 1) for each in trained)
    assert all(each.rank == 0 for each in drawn if each.stage == "publish"), "publishing is one pod's work"


def test_every_moment_occurs() -> None:
    moments = {each.moment for each in plan(1, 400)}
    assert moments == {"publish", "rendezvous", *(f"step {step}" for step in range(1, LATEST_STEP + 1))}


def ending(
    *kinds: Kind, reasons: Sequence[str] = (), user: int = 0, infrastructure: int = 0, step: int = STEPS
) -> Ending:
    status = InternVLFineTuneStatus(
        phase="Succeeded",
        attempt=len(reasons) + 1,
        restarts=Restarts(user=user, infrastructure=infrastructure),
        progress=Progress(step=step),
    )
    return Ending(status, reasons, kinds)


@pytest.mark.parametrize(
    "good",
    [
        pytest.param(ending(), id="nothing happened"),
        pytest.param(ending(OPERATOR_KILLED, API_SERVER_RESTARTED), id="nothing that ends an attempt"),
        pytest.param(ending(WORKER_DELETED, reasons=["WorkerLost"], infrastructure=1), id="a worker deleted"),
        pytest.param(ending(TRAINER_KILLED, reasons=["WorkerKilled"], user=1), id="a process killed"),
        pytest.param(ending(TRAINER_KILLED, NODE_LOST, reasons=["NodeLost"], infrastructure=1), id="the graver counts"),
        pytest.param(ending(STORAGE_STOPPED, reasons=["StorageUnavailable"] * 2), id="no budget for waiting"),
    ],
)
def test_an_expected_ending_has_no_complaints(good: Ending) -> None:
    assert complaints(good) == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        pytest.param(
            ending(OPERATOR_KILLED, reasons=["WorkerLost"], infrastructure=1),
            "which no disturbance explains",
            id="reason",
        ),
        pytest.param(ending(NODE_LOST, reasons=["NodeLost"], user=1), "1 restarts count against the user", id="blamed"),
        pytest.param(ending(TRAINER_KILLED, reasons=["WorkerKilled"]), "0 restarts count", id="not blamed"),
        pytest.param(ending(step=14), "ends at step 14", id="figures of an attempt that was lost"),
        pytest.param(ending(WORKER_DELETED), "no infrastructure restart", id="not noticed"),
    ],
)
def test_an_unexpected_ending_is_reported(bad: Ending, words: str) -> None:
    assert words in "; ".join(complaints(bad))


def test_an_unobserved_end_of_an_attempt_is_reported_unless_the_api_server_restarted() -> None:
    status = InternVLFineTuneStatus(phase="Succeeded", attempt=2, progress=Progress(step=STEPS))
    assert "1 attempts ended, and 0 were observed" in complaints(Ending(status, [], [NODE_LOST]))
    assert complaints(Ending(status, [], [NODE_LOST, API_SERVER_RESTARTED])) == []


def test_a_failed_run_is_reported_with_its_reason() -> None:
    failed = Condition(
        type="Failed", status="True", reason="BackoffLimitExceeded", message="x", last_transition_time=""
    )
    (found,) = complaints(Ending(InternVLFineTuneStatus(phase="Failed", conditions=[failed]), [], []))
    assert "BackoffLimitExceeded" in found


def test_differences_from_the_undisturbed_run() -> None:
    good = Product([Loss(1, 2.0), Loss(2, 1.0)], {"adapter.safetensors": "00"})
    assert differences(good, good) == []
    assert differences(Product([Loss(1, 2.0), Loss(2, 1.0 + 1e-7)], good.adapter), good) == []
    assert "differ by" in differences(Product([Loss(1, 2.0), Loss(2, 1.1)], good.adapter), good)[0]
    assert "differ by inf" in differences(Product([Loss(1, 2.0)], good.adapter), good)[0]
    assert "other bytes" in differences(Product(good.curve, {"adapter.safetensors": "01"}), good)[0]
    half = Product(good.curve, good.adapter, {"step-00000005": False})
    assert "step-00000005 is not a complete checkpoint" in differences(half, good)[0]

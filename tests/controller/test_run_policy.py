"""Rules of time and counting."""

import pytest
from controller.builders import CONFIG, NOW, at, member, text
from internvl_api.spec import RunPolicy
from internvl_api.status import InternVLFineTuneStatus, Restarts
from internvl_operator.core.policies import run_policy
from internvl_operator.core.policies.outcome import Budget, Kind, Outcome


def outcome(kind: Kind, budget: Budget = "none") -> Outcome:
    return Outcome(kind, "Reason", "words", budget)


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [(0, 0), (1, 10), (2, 20), (3, 40), (4, 80), (5, 160), (6, 300), (7, 300), (10_000, 300)],
)
def test_backoff_doubles_up_to_its_cap(failures: int, seconds: float) -> None:
    assert run_policy.backoff(failures, CONFIG) == seconds


@pytest.mark.parametrize(
    ("kind", "budget", "failures", "seconds"),
    [
        pytest.param("stall", "none", 1, 10, id="a-stalled-stage-always-waits"),
        pytest.param("stall", "none", 3, 40, id="longer-every-time"),
        pytest.param("resume", "none", 1, 0, id="resume-at-once"),
        pytest.param("resume", "none", 2, 10, id="resume-without-progress-waits"),
        pytest.param("retry", "infrastructure", 1, 0, id="lost-worker-at-once"),
        pytest.param("retry", "infrastructure", 4, 40, id="lost-again-and-again"),
        pytest.param("retry", "user", 1, 0, id="failure-at-once"),
        pytest.param("retry", "user", 2, 10, id="failure-again"),
    ],
)
def test_pause_before_the_next_attempt(kind: Kind, budget: Budget, failures: int, seconds: float) -> None:
    assert run_policy.restart_delay(outcome(kind, budget), failures, CONFIG) == seconds


@pytest.mark.parametrize(
    ("kind", "budget", "user", "infrastructure", "reason"),
    [
        pytest.param("retry", "user", 2, 99, None, id="one-restart-left"),
        pytest.param("retry", "user", 3, 0, "BackoffLimitExceeded", id="none-left"),
        pytest.param("retry", "infrastructure", 99, 4, None, id="one-loss-left"),
        pytest.param("retry", "infrastructure", 0, 5, "InfrastructureLimitExceeded", id="lost-too-often"),
        pytest.param("resume", "none", 99, 99, None, id="asked-to-be-resumed"),
        pytest.param("change", "none", 99, 99, None, id="changes-something"),
        pytest.param("stall", "none", 99, 99, None, id="waits-for-the-user"),
    ],
)
def test_each_budget_is_used_up_by_its_own_failures_alone(
    kind: Kind, budget: Budget, user: int, infrastructure: int, reason: str | None
) -> None:
    status = InternVLFineTuneStatus(restarts=Restarts(user=user), infrastructure_failures=infrastructure)
    judged = run_policy.within_budget(outcome(kind, budget), status, RunPolicy(backoff_limit=3, infrastructure_limit=5))
    assert (judged.reason if judged.kind == "fail" else None) == reason


@pytest.mark.parametrize(
    ("seconds", "started", "left"),
    [
        pytest.param(None, at(-1000), None, id="no-deadline"),
        pytest.param(60, None, None, id="not-started"),
        pytest.param(60, at(-10), 50.0, id="time-left"),
        pytest.param(60, at(-60), 0.0, id="just-over"),
        pytest.param(60, at(-600), 0.0, id="long-over"),
        pytest.param(60, at(+10), 70.0, id="started-by-a-faster-clock"),
    ],
)
def test_deadline_and_time_to_live(seconds: int | None, started: object, left: float | None) -> None:
    moment = text(started) if started else None  # type: ignore[arg-type]
    status = InternVLFineTuneStatus(started_at=moment, finished_at=moment)
    policy = RunPolicy(active_deadline_seconds=seconds, ttl_seconds_after_finished=seconds)
    assert run_policy.deadline_left(policy, status, NOW) == left
    assert run_policy.ttl_left(policy, status, NOW) == left


@pytest.mark.parametrize(
    ("grace_ends", "left"),
    [
        pytest.param(at(120), 180.0, id="within-its-grace-period"),
        pytest.param(at(-59), 1.0, id="almost"),
        pytest.param(at(-60), 0.0, id="its-node-is-dead"),
        pytest.param(None, 60.0, id="not-asked-yet"),
    ],
)
def test_when_a_pod_that_will_not_go_is_forced(grace_ends: object, left: float) -> None:
    assert run_policy.force_left(member(deletion_timestamp=grace_ends), NOW, CONFIG) == left


@pytest.mark.parametrize("moment", [None, "", "yesterday", text(at(-1))])
def test_a_moment_that_is_past_or_unreadable_is_not_waited_for(moment: str | None) -> None:
    assert run_policy.seconds_until(moment, NOW) == 0.0

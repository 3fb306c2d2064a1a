"""Groups that the API server lets the operator create only in part: a quota admits one of two pods."""

import pytest
from controller.builders import Raw, at, text
from controller.fake_server import Server
from controller.simulator import World
from internvl_api.constants import KIND
from internvl_operator.core.policies import run_policy
from internvl_operator.kube.client import ApiError


def quota(server: Server, pods: int) -> None:
    """Let at most `pods` training pods exist."""

    def refuse(obj: Raw) -> ApiError | None:
        name = obj["metadata"]["name"]
        if obj["kind"] != "Pod" or "-train-" not in name or name in server.pods:
            return None
        alive = [pod for pod in server.pods if "-train-" in pod]
        text = f'pods "{name}" is forbidden: exceeded quota: team, requested: pods=1, used: pods={pods}'
        return ApiError(403, "Forbidden", text) if len(alive) >= pods else None

    server.refuse = refuse


def half_a_group() -> World:
    world = World()
    quota(world.server, 1)
    world.run("preflight")
    world.pass_stage("preflight")
    return world


def test_a_refused_worker_releases_its_siblings_at_once() -> None:
    world = half_a_group()
    assert world.status["phase"] == "Stalled"
    stalled = world.server.condition("Stalled")
    assert stalled["reason"] == "QuotaExceeded"
    assert "exceeded quota: team" in stalled["message"]
    assert all("deletionTimestamp" in world.server.pods[name]["metadata"] for name in world.pods("train"))
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}


def test_status_keeps_what_the_pass_recorded() -> None:
    world = half_a_group()
    assert world.status["stage"] == "train"
    assert {stage["name"]: stage["state"] for stage in world.status["stages"]}["preflight"] == "Succeeded"


def test_the_group_is_tried_again_after_a_pause_and_runs_when_the_quota_allows() -> None:
    world = half_a_group()
    world.collect()
    assert world.pods("train") == []  # it pauses
    quota(world.server, 2)
    world.later(3600)
    assert len(world.pods("train")) == 2
    world.run("train")
    assert world.status["phase"] == "Running"


def test_a_deadline_counts_while_the_quota_refuses() -> None:
    world = World(runPolicy={"activeDeadlineSeconds": 600})
    quota(world.server, 1)
    world.run("preflight")
    world.pass_stage("preflight")
    for _ in range(4):
        world.collect()
        world.later(200)
    assert world.server.condition("Failed")["reason"] == "DeadlineExceeded"


def test_a_service_that_is_refused_does_not_end_a_running_group() -> None:
    world = World()
    world.reach("train")
    refusal = ApiError(403, "Forbidden", "services are forbidden")
    world.server.refuse = lambda obj: refusal if obj["kind"] == "Service" else None
    world.server.remove("Service", "ivft-run")
    for _ in range(3):
        world.operator.hear()
        world.operator.run_pass()
    assert {"deletionTimestamp" in world.server.pods[name]["metadata"] for name in world.pods("train")} == {False}
    world.server.refuse = lambda obj: None
    world.operator.settle()
    assert world.status["phase"] == "Running"
    assert world.server.attempts("train") == {"1"}


def test_a_very_long_refusal_is_cut_and_does_not_keep_status_from_being_written() -> None:
    world = World(minWorkers=1)
    long = "exceeded quota: team, " + "x" * 100_000
    world.server.refuse = lambda obj: (
        ApiError(403, "Forbidden", long) if obj["metadata"]["name"] == "run-train-1" else None
    )
    world.pass_stage("preflight")
    assert world.status["elastic"]["workers"] == 1
    assert 1000 < len(world.status["elastic"]["message"]) < 10_000
    assert max(len(entry.get("message") or "") for entry in world.status["stages"]) < 10_000


@pytest.mark.parametrize(("running", "seconds"), [((0,), run_policy.SHORT_GRACE), ((0, 1), 120)])
def test_workers_whose_peer_never_started_get_a_short_grace_period(running: tuple[int, ...], seconds: int) -> None:
    """They have not met, so they have nothing to save; a group that ran as a whole gets its whole grace period."""
    world = World()
    world.pass_stage("preflight")
    for rank in running:
        world.server.set_pod(f"run-train-{rank}", {"phase": "Running"})
    world.operator.settle()
    world.server.change(KIND, "run", lambda raw: raw["spec"].update(runPolicy={"suspend": True}))
    world.operator.settle()
    assert world.server.pods["run-train-0"]["metadata"]["deletionTimestamp"] == text(at(seconds))

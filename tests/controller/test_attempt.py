"""Attempts in whole runs: which end costs a restart, when the next one starts, and what becomes of the pods."""

from collections.abc import Callable
from typing import Any

import pytest
from controller.builders import result, terminated
from controller.fake_server import Server
from controller.simulator import World


@pytest.mark.parametrize(
    "lose",
    [
        pytest.param(
            lambda server: server.delete("Pod", "team", "run-train-1", uid=_uid(server), force=False), id="deleted"
        ),
        pytest.param(lambda server: server.remove("Pod", "run-train-1"), id="vanished"),
        pytest.param(
            lambda server: server.set_pod("run-train-1", {"phase": "Failed", "reason": "Evicted", "message": "disk"}),
            id="evicted",
        ),
        pytest.param(
            lambda server: server.set_pod("run-train-1", {"phase": "Failed", **terminated(255, reason="Unknown")}),
            id="node-came-back-without-it",
        ),
    ],
)
def test_a_lost_worker_restarts_the_whole_group_without_touching_the_users_budget(
    lose: Callable[[Server], Any],
) -> None:
    world = World()
    world.reach("train")
    survivor = world.server.pods["run-train-0"]["metadata"]["uid"]
    lose(world.server)
    world.operator.settle()
    assert "deletionTimestamp" in world.server.pods["run-train-0"]["metadata"]  # it may save a checkpoint first
    assert world.server.attempts("train") <= {"1"}
    world.collect()
    assert world.server.attempts("train") == {"2"}
    assert world.server.pods["run-train-0"]["metadata"]["uid"] != survivor
    assert world.status["attempt"] == 2
    assert world.status["restarts"] == {"user": 0, "infrastructure": 1}
    world.run("train")
    assert world.status["phase"] == "Running"


def test_failures_of_the_run_are_retried_with_growing_pauses_and_then_end_it() -> None:
    world = World(runPolicy={"backoffLimit": 2})
    world.pass_stage("preflight")
    for failures, pause in ((1, 0), (2, 10)):
        world.run("train")
        world.end("train", 1, "boom")
        if pause:
            assert world.server.attempts("train") == {str(failures)}  # the failed pods' logs stay while we wait
            world.later(pause - 1)
            assert world.server.attempts("train") == {str(failures)}
            world.later(1)
        assert world.server.attempts("train") == {str(failures + 1)}
        assert world.status["restarts"]["user"] == failures
    world.run("train")
    world.end("train", 1, "boom")
    assert world.status["phase"] == "Failed"
    failed = world.server.condition("Failed")
    assert (failed["status"], failed["reason"]) == ("True", "BackoffLimitExceeded")
    assert "boom" in failed["message"]
    assert "backoffLimit" in failed["message"]
    assert world.server.condition("Stalled")["status"] == "True"


def test_a_failed_run_is_tried_again_when_its_spec_changes() -> None:
    world = World(runPolicy={"backoffLimit": 0})
    world.pass_stage("preflight")
    world.run("train")
    world.end("train", 1, "boom")
    assert world.status["phase"] == "Failed"
    world.server.edit_spec(runPolicy={"backoffLimit": 1})
    world.operator.settle()
    world.collect()
    assert world.status["phase"] == "Pending"
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}
    assert world.server.attempts("train") == {"2"}


def test_a_worker_that_hangs_after_its_peer_failed_is_given_some_seconds_then_goes_with_the_group() -> None:
    world = World()
    world.reach("train")
    world.end("train", 1, "boom", ranks=(0,))
    assert world.status["attempt"] == 1
    assert world.operator.requeue == 5
    world.later(5)
    assert world.status["attempt"] == 2
    assert "worker 0" in world.status["stages"][1]["message"]


def test_the_node_that_died_is_blamed_and_not_the_peer_that_failed_because_of_it() -> None:
    world = World()
    world.reach("train")
    world.end("train", 1, "connection reset by peer", ranks=(0,))
    world.server.set_pod("run-train-1", {"phase": "Failed", "reason": "NodeLost", "message": "node gone"})
    world.operator.settle()
    assert world.status["restarts"] == {"user": 0, "infrastructure": 1}


def test_asking_to_be_resumed_costs_nothing_and_starts_again_at_once() -> None:
    world = World()
    world.reach("train")
    for step in (20, 40, 60):
        checkpoint = {"step": step, "uri": f"s3://out/{step}", "sha256": "0", "verifiedAt": "2026-01-31T12:00:00Z"}
        world.end("train", 75, result("train", "resume", "Preempted", checkpoint=checkpoint))
        assert world.status["checkpoint"]["step"] == step
        assert world.status["restarts"] == {"user": 0, "infrastructure": 0}
        assert world.server.attempts("train") == {str(step // 20 + 1)}
        world.run("train")


def test_resuming_without_ever_getting_further_does_not_become_a_hot_loop() -> None:
    world = World()
    world.reach("train")
    world.end("train", 75)
    world.run("train")
    world.end("train", 75)
    assert world.server.attempts("train") == {"2"}
    assert world.status["retryAt"] == "2026-01-31T12:00:10Z"


def test_a_mistake_found_by_preflight_stalls_the_run_and_is_tried_again_later() -> None:
    world = World()
    words = "data.train.photos.annotation: s3://data/train.jsonl:3: found no field conversations"
    for attempt, pause in ((1, 10), (2, 20), (3, 40), (4, 80), (5, 160), (6, 300), (7, 300)):
        world.run("preflight")
        world.end("preflight", 65, result("preflight", "failed", "BrokenRow", message=words))
        stalled = world.server.condition("Stalled")
        assert (stalled["status"], stalled["reason"]) == ("True", "BrokenRow")
        assert words in stalled["message"]
        assert world.status["phase"] == "Stalled"
        assert world.server.condition("Reconciling")["status"] == "False"
        assert world.server.attempts("preflight") == {str(attempt)}
        world.later(pause)
        assert world.server.attempts("preflight") == {str(attempt + 1)}
    world.pass_stage("preflight")  # the file was mended meanwhile
    assert world.status["stage"] == "train"
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}
    assert world.server.condition("Stalled")["status"] == "False"


def test_a_stalled_run_is_tried_at_once_when_its_spec_changes() -> None:
    world = World()
    world.run("preflight")
    world.end("preflight", 77, result("preflight", "failed", "AccessDenied", message="secret s3-credentials"))
    assert world.server.attempts("preflight") == {"1"}
    world.server.edit_spec(secrets={"objectStorage": "other"})
    world.operator.settle()
    assert world.server.attempts("preflight") == {"2"}
    env = world.server.pods["run-preflight-0"]["spec"]["containers"][0]["env"]
    assert {each["valueFrom"]["secretKeyRef"]["name"] for each in env if "valueFrom" in each} == {"other"}


@pytest.mark.parametrize(
    "code", [pytest.param(code, id=name) for code, name in ((65, "user-error"), (69, "unavailable"))]
)
def test_training_frees_its_pods_while_it_is_stalled(code: int) -> None:
    world = World()
    world.reach("train")
    world.end("train", code, result("train", "failed", "Named", message="why"), ranks=(1,))
    assert world.server.condition("Stalled")["reason"] == "Named"
    world.collect()
    running = [name for name in world.pods("train") if world.server.pods[name]["status"]["phase"] == "Running"]
    assert running == []


def test_a_pod_on_a_dead_node_is_deleted_by_force_in_the_end() -> None:
    world = World()
    world.reach("train")
    world.server.delete("Pod", "team", "run-train-1", uid=_uid(world.server), force=False)
    world.operator.settle()
    world.later(120 + 59)  # grace period and almost the bound: its kubelet does not answer
    assert world.server.attempts("train") == {"1"}
    world.later(1)
    assert world.server.attempts("train") == {"2"}


def _uid(server: Server) -> str:
    uid: str = server.pods["run-train-1"]["metadata"]["uid"]
    return uid

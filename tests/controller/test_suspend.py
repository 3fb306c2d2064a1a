"""Suspended and resumed runs."""

import pytest
from controller.builders import terminated
from controller.fake_server import clock
from controller.simulator import World
from internvl_api.constants import KIND
from internvl_operator.kube.client import ApiError


def test_suspend_frees_every_pod_and_resume_starts_a_new_attempt_that_costs_nothing() -> None:
    world = World()
    world.reach("train")
    world.server.edit_spec(runPolicy={"suspend": True})
    world.operator.settle()
    assert world.server.condition("Suspended")["status"] == "True"
    assert all("deletionTimestamp" in world.server.pods[name]["metadata"] for name in world.pods("train"))
    world.collect()
    assert world.pods("train") == []
    assert world.status["phase"] == "Suspended"
    assert world.status["workers"] == {"active": 0, "succeeded": 0, "failed": 0}
    world.later(3600)
    assert world.pods("train") == []
    world.server.edit_spec(runPolicy={"suspend": False})
    world.operator.settle()
    assert world.server.attempts("train") == {"2"}
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}
    assert world.server.condition("Suspended")["status"] == "False"
    assert world.pods("preflight") == ["run-preflight-0"]  # what was done is not done again


def test_a_run_created_suspended_makes_nothing() -> None:
    world = World(runPolicy={"suspend": True})
    assert world.server.created == []
    assert world.status["phase"] == "Suspended"


def test_a_stage_that_ended_well_while_being_suspended_is_not_run_again() -> None:
    world = World()
    world.reach("train")
    for name in world.pods("train"):
        world.server.set_pod(name, {"phase": "Succeeded", **terminated(0)})
    world.server.edit_spec(runPolicy={"suspend": True})
    world.operator.settle()
    assert world.status["phase"] == "Suspended"
    assert world.status["stage"] == "publish"


def test_a_change_made_while_suspended_is_not_forgotten() -> None:
    world = World()
    world.reach("train")
    world.server.edit_spec(runPolicy={"suspend": True})
    world.operator.settle()
    world.collect()
    world.server.edit_spec(workers=1)
    world.operator.settle()
    world.server.edit_spec(runPolicy={"suspend": False})
    world.operator.settle()
    assert world.status["stage"] == "preflight"
    digest = world.server.pods["run-preflight-0"]["metadata"]["annotations"]["internvl.dev/run-digest"]
    assert digest == world.status["runDigest"]
    world.pass_stage("preflight")
    assert world.pods("train") == ["run-train-0"]


@pytest.mark.parametrize(
    ("error", "freed"),
    [
        pytest.param(ApiError(403, "Forbidden", "denied by a policy"), True, id="refused"),
        pytest.param(ApiError(500, "InternalError", "failed calling webhook"), True, id="a-webhook-is-down"),
        pytest.param(ApiError(409, "Conflict", "the object has been modified"), False, id="seen-too-late"),
    ],
)
def test_a_refused_status_does_not_keep_the_pods_of_a_suspended_run(error: ApiError, freed: bool) -> None:
    world = World()
    world.reach("train")
    world.server.edit_spec(runPolicy={"suspend": True})
    world.server.refuse = lambda obj: error if obj["kind"] == KIND else None
    world.operator.hear()
    world.operator.run_pass()
    assert world.status["phase"] == "Running"
    assert all(("deletionTimestamp" in world.server.pods[name]["metadata"]) == freed for name in world.pods("train"))
    world.server.refuse = lambda obj: None
    world.operator.settle()
    world.collect()
    assert (world.status["phase"], world.pods("train")) == ("Suspended", [])
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}


def test_a_refused_status_does_not_keep_the_pods_of_a_run_beyond_its_deadline() -> None:
    world = World(runPolicy={"activeDeadlineSeconds": 60})
    world.reach("train")
    error = ApiError(500, "InternalError", "json: unsupported value: NaN")
    world.server.refuse = lambda obj: error if obj["kind"] == KIND else None
    clock(world.server, 61)
    world.operator.hear()
    world.operator.run_pass()
    assert world.status["phase"] == "Running"
    assert all("deletionTimestamp" in world.server.pods[name]["metadata"] for name in world.pods("train"))
    world.server.refuse = lambda obj: None
    world.operator.settle()
    world.collect()
    assert (world.status["phase"], world.pods("train")) == ("Failed", [])
    assert world.server.condition("Failed")["reason"] == "DeadlineExceeded"
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}

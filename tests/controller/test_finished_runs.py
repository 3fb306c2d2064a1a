"""Runs that are published or have failed: their pods, deadlines and deletion."""

import pytest
from controller.builders import Raw, result
from controller.fake_server import clock
from controller.simulator import STAGES, World
from internvl_api.constants import KIND


def test_a_complete_run_stays_complete_whatever_becomes_of_its_spec() -> None:
    world = World()
    for stage in STAGES:
        world.pass_stage(stage)
    world.server.edit_spec(workers=1)
    world.operator.settle()
    assert world.status["phase"] == "Succeeded"
    assert world.status["observedGeneration"] == 2
    assert {condition["observedGeneration"] for condition in world.status["conditions"]} == {2}
    assert len(world.server.pods) == 4


def test_a_complete_run_whose_stages_come_back_in_another_order_is_left_at_that() -> None:
    world = World()
    for stage in STAGES:
        world.pass_stage(stage)
    world.server.change(KIND, "run", lambda raw: raw["status"]["stages"].reverse())
    before = len(world.server.writes)
    world.operator.settle()
    assert world.status["stage"] == "publish"
    assert len(world.server.writes) == before


def test_a_run_past_its_deadline_fails_and_frees_its_pods() -> None:
    world = World(runPolicy={"activeDeadlineSeconds": 100})
    world.reach("train")
    world.later(99)
    assert world.status["phase"] == "Running"
    assert world.operator.requeue == 1
    world.later(1)
    assert world.server.condition("Failed")["reason"] == "DeadlineExceeded"
    assert all("deletionTimestamp" in world.server.pods[name]["metadata"] for name in world.pods("train"))


def test_the_deadline_counts_anew_after_a_suspension() -> None:
    world = World(runPolicy={"activeDeadlineSeconds": 100})
    world.reach("train")
    world.later(60)
    world.server.edit_spec(runPolicy={"activeDeadlineSeconds": 100, "suspend": True})
    world.operator.settle()
    world.collect()
    world.later(1000)
    assert world.status["phase"] == "Suspended"
    world.server.edit_spec(runPolicy={"activeDeadlineSeconds": 100})
    world.operator.settle()
    world.run("train")
    world.later(99)
    assert world.status["phase"] == "Running"
    world.later(1)
    assert world.server.condition("Failed")["reason"] == "DeadlineExceeded"


def test_a_finished_run_is_deleted_after_its_time_to_live() -> None:
    world = World(runPolicy={"ttlSecondsAfterFinished": 60})
    for stage in STAGES:
        world.pass_stage(stage)
    assert world.operator.requeue == 60
    clock(world.server, 60)
    world.operator.run_pass()
    assert not any(world.server.objects.values())


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        pytest.param({}, ["run-preflight-0"], id="running-ones-by-default"),
        pytest.param({"cleanPodPolicy": "All"}, [], id="all"),
        pytest.param({"cleanPodPolicy": "None"}, ["run-preflight-0", "run-train-0", "run-train-1"], id="none"),
    ],
)
def test_pods_that_are_left_when_a_run_has_failed(policy: Raw, left: list[str]) -> None:
    world = World(runPolicy={"activeDeadlineSeconds": 100, **policy})
    world.reach("train")
    world.later(100)
    world.collect()
    assert world.status["phase"] == "Failed"
    assert sorted(world.server.pods) == left
    before = len(world.server.writes)
    world.later(60)
    assert world.server.writes[before:] == []


def test_no_pod_is_left_of_a_published_run_that_wants_them_all_gone() -> None:
    world = World(runPolicy={"cleanPodPolicy": "All"})
    for stage in STAGES:
        world.pass_stage(stage)
    assert (world.status["phase"], world.server.pods) == ("Succeeded", {})
    world.later(3600)
    assert (world.status["phase"], world.server.pods) == ("Succeeded", {})


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param({"training": {"maxSteps": -1}}, id="a-wrong-value"),
        pytest.param({"recipe": "none-of-this-name"}, id="a-recipe-that-is-gone"),
    ],
)
def test_a_finished_run_obeys_its_run_policy_whatever_else_is_wrong(mistake: Raw) -> None:
    world = World()
    for stage in STAGES:
        world.pass_stage(stage)
    world.server.edit_spec(**mistake, runPolicy={"cleanPodPolicy": "All", "ttlSecondsAfterFinished": 60})
    world.operator.settle()
    assert (world.status["phase"], world.server.pods) == ("Succeeded", {})
    assert world.operator.requeue == 60
    clock(world.server, 60)
    world.operator.run_pass()
    assert not any(world.server.objects.values())


def test_a_published_run_that_is_applied_again_takes_one_pod_and_no_gpu() -> None:
    world = World(
        workers=2, gpusPerWorker=4, evaluation={"tasks": {"coco": {"task": "caption", "annotation": "s3://d/c"}}}
    )
    found = {"artifacts": {"model": "s3://out/run/artifacts/model"}, "evaluation": {"final": {"coco": {"CIDEr": 1.0}}}}
    world.run("preflight")
    world.end("preflight", 0, result("preflight", reason="AlreadyPublished", **found))
    assert (world.status["phase"], world.server.condition("Ready")["reason"]) == ("Succeeded", "AlreadyPublished")
    assert [(stage["name"], stage["state"]) for stage in world.status["stages"]] == [
        ("preflight", "Succeeded"),
        ("train", "Skipped"),
        ("evaluate", "Skipped"),
        ("score", "Skipped"),
        ("publish", "Skipped"),
    ]
    assert world.status["artifacts"] == found["artifacts"]
    assert world.status["evaluation"]["final"] == {"coco": {"CIDEr": 1.0}}
    assert [name for kind, name in world.server.created if kind == "Pod"] == ["run-preflight-0"]
    world.later(3600)
    assert world.status["phase"] == "Succeeded"


def test_only_preflight_can_end_a_run_early() -> None:
    world = World()
    world.reach("train")
    world.end("train", 0, result("train", reason="AlreadyPublished"))
    assert world.status["phase"] != "Succeeded"
    assert world.pods("publish") == ["run-publish-0"]

"""Whole runs against the simulated cluster: what `kubectl get` and `describe` show."""

from controller.builders import custom_resource, result
from controller.fake_server import Server, clock
from controller.simulator import STAGES, Operator, World
from internvl_api.constants import KIND
from internvl_api.status import Progress


def test_a_run_goes_through_its_stages_and_is_ready_only_when_published() -> None:
    world = World()
    assert world.pods("preflight") == ["run-preflight-0"]
    assert world.pods("train") == []
    seen = []
    for stage in STAGES:
        seen.append((world.status["stage"], world.status["phase"], world.server.condition("Ready")["status"]))
        world.run(stage)
        seen.append((world.status["stage"], world.status["phase"], world.server.condition("Ready")["status"]))
        world.end(stage, 0, result(stage, artifacts={"adapter": "s3://out/a"} if stage == "publish" else {}))
    assert seen == [
        ("preflight", "Pending", "False"),
        ("preflight", "Running", "False"),
        ("train", "Pending", "False"),
        ("train", "Running", "False"),
        ("publish", "Pending", "False"),
        ("publish", "Running", "False"),
    ]
    assert world.status["phase"] == "Succeeded"
    assert world.server.condition("Ready")["status"] == "True"
    assert world.server.condition("Complete")["status"] == "True"
    assert world.status["artifacts"] == {"adapter": "s3://out/a"}
    assert [entry["state"] for entry in world.status["stages"]] == ["Succeeded"] * 3
    # the logs of every stage can still be read
    assert len(world.server.pods) == 4


def test_a_settled_run_is_not_written_to() -> None:
    world = World()
    world.reach("train")
    before = len(world.server.writes)
    for _ in range(5):
        clock(world.server, 60)
        world.operator.run_pass()
    fresh = Operator(world.server)
    fresh.run_pass()
    assert world.server.writes[before:] == []


def test_a_server_whose_older_crd_drops_a_field_is_not_asked_again_and_again() -> None:
    server = Server()
    keep = server.apply_status
    server.apply_status = lambda obj: keep(  # type: ignore[method-assign]
        obj | {"status": {key: value for key, value in obj["status"].items() if key != "workers"}}
    )
    server.create(custom_resource())
    operator = Operator(server)
    operator.settle()
    written = len(server.writes)
    operator.run_pass()
    assert len(server.writes) == written
    server.set_pod("run-preflight-0", {"phase": "Running"})
    operator.settle()
    assert server.status()["phase"] == "Running"


def test_the_progress_column_tells_of_the_stage_that_runs() -> None:
    world = World()
    world.reach("train")
    world.end("train", 0, result("train", progress={"stage": "train", "step": 9, "totalSteps": 9, "loss": 0.5}))
    assert world.status["stage"] == "publish"
    assert "progressText" not in world.status
    world.run("publish")
    uploading = {"stage": "publish", "detail": "uploading"}
    world.server.answers["run-publish-0"] = Progress.model_validate(uploading)
    world.operator.run_pass()
    world.operator.settle()
    assert world.status["progressText"] == "uploading"
    world.end("publish", 0, result("publish", progress=uploading))
    assert world.status["progressText"] == "9/9 loss 0.500"


def test_what_a_worker_did_is_not_told_when_it_is_gone() -> None:
    world = World()
    busy = {"stage": "preflight", "detail": "downloading s3://x", "etaSeconds": 5, "tokensPerSecond": 3}
    world.run("preflight")
    world.server.answers["run-preflight-0"] = Progress.model_validate(busy)
    for _ in range(2):
        world.operator.run_pass()
        world.operator.settle()
    assert world.status["progress"]["detail"] == "downloading s3://x"
    world.end("preflight", 1)
    assert world.status["progress"] == {"stage": "preflight"}
    assert "progressText" not in world.status


def test_a_lost_attempt_keeps_the_figures_of_training() -> None:
    world = World()
    world.reach("train")
    busy = {"stage": "train", "detail": "step", "step": 4, "totalSteps": 9, "loss": 0.5, "tokensPerSecond": 3}
    world.server.answers["run-train-0"] = Progress.model_validate(busy)
    for _ in range(2):
        world.operator.run_pass()
        world.operator.settle()
    world.end("train", 1, ranks=(0, 1))
    assert world.status["progress"] == {"stage": "train", "step": 4, "totalSteps": 9, "loss": 0.5}
    assert world.status["progressText"] == "4/9 loss 0.500"


def test_a_deleted_run_is_left_to_the_garbage_collector() -> None:
    world = World()
    world.server.change(KIND, "run", lambda raw: raw["metadata"].update(deletionTimestamp="2026-01-31T12:00:00Z"))
    before = len(world.server.writes)
    world.operator.hear()
    world.operator.run_pass()
    assert world.server.writes[before:] == []

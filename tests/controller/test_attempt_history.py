"""The attempts in status: when each held its GPUs, how it ended, and that their number is bounded."""

from typing import Any

from controller.builders import Raw, result, text, waiting
from controller.simulator import Operator, World
from internvl_api.status import ATTEMPTS_LISTED
from internvl_operator.core.run import read_status
from internvl_operator.kubectl_ivft import cost


def training(**changes: Any) -> World:
    world = World(gpusPerWorker=4, training={"globalBatchSize": 32}, **changes)
    world.pass_stage("preflight")
    return world


def attempts(world: World, stage: str = "train") -> list[Raw]:
    (entry,) = [entry for entry in world.status["stages"] if entry["name"] == stage]
    return list(entry.get("attempts", ()))


def test_a_pod_that_got_a_node_costs_no_write_of_the_status() -> None:
    world = training()
    before = len(world.server.writes)
    for name in world.pods("train"):
        world.server.change("Pod", name, lambda raw: raw["spec"].update(nodeName="node-1"))
        world.server.set_pod(name, {"startTime": text(world.server.now)})
        world.operator.settle()
    assert world.server.writes[before:] == []
    begun = text(world.server.now)
    world.server.now = world.server.now.replace(hour=13)
    world.run("train")
    assert attempts(world) == [{"number": 1, "gpus": 8, "startedAt": begun}]


def test_an_attempt_that_ends_before_it_runs_is_counted() -> None:
    world = training(runPolicy={"startDeadlineSeconds": 60})
    begun = text(world.server.now)
    for name in world.pods("train"):
        world.server.change("Pod", name, lambda raw: raw["spec"].update(nodeName="node-1"))
        world.server.set_pod(name, {"startTime": begun, **waiting("ContainerCreating")})
    world.operator.settle()
    world.later(60)
    assert [(each["startedAt"], each["reason"]) for each in attempts(world)] == [(begun, "StartDeadlineExceeded")]


def lose_a_worker(world: World) -> None:
    world.server.remove("Pod", "run-train-1")
    world.operator.settle()
    world.collect()
    world.later(3600)


def test_an_attempt_counts_from_the_first_pod_on_a_node_to_its_end() -> None:
    world = training()
    world.later(600)  # no node yet
    assert attempts(world) == []
    begun = text(world.server.now)
    world.run("train")
    world.later(1800)
    assert attempts(world) == [{"number": 1, "gpus": 8, "startedAt": begun}]
    world.end("train", 0, result("train"))
    ended = {"finishedAt": text(world.server.now), "reason": "Succeeded"}
    assert attempts(world) == [{"number": 1, "gpus": 8, "startedAt": begun, **ended}]
    assert [(entry["gpus"], entry["reason"]) for entry in attempts(world, "preflight")] == [(0, "Succeeded")]


def test_each_attempt_is_listed_with_its_reason() -> None:
    world = training()
    world.run("train")
    lose_a_worker(world)
    world.run("train")
    world.server.edit_spec(runPolicy={"suspend": True})
    world.operator.settle()
    world.collect()
    world.server.edit_spec(runPolicy={"suspend": False})
    world.operator.settle()
    world.run("train")
    world.server.edit_spec(training={"globalBatchSize": 64})
    world.operator.settle()
    world.collect()
    assert [(each["number"], each.get("reason")) for each in attempts(world)] == [
        (1, "WorkerLost"), (2, "Suspended"), (3, "SpecChanged"),
    ]  # fmt: skip


def test_a_pod_that_ended_while_no_operator_ran_is_counted() -> None:
    world = training()
    for name in world.pods("train"):
        world.server.set_pod(name, {"phase": "Running", "startTime": text(world.server.now)})
    begun = text(world.server.now)
    world.server.now = world.server.now.replace(hour=13)
    world.operator = Operator(world.server)
    world.end("train", 0, result("train"))
    assert [(each["startedAt"], each["reason"]) for each in attempts(world)] == [(begun, "Succeeded")]


def test_the_list_is_bounded_and_no_gpu_second_is_lost() -> None:
    world = training(runPolicy={"infrastructureLimit": 100})
    for _ in range(ATTEMPTS_LISTED + 2):
        world.run("train")
        world.later(450)
        lose_a_worker(world)
    world.run("train")
    world.later(900)
    assert [each["number"] for each in attempts(world)] == list(range(4, ATTEMPTS_LISTED + 4))
    lines = cost.lines(read_status(world.status).stages, world.server.now)
    assert next(line.attempt for line in lines if line.stage == "train") == "earlier"
    assert lines[-1].gpu_hours == ATTEMPTS_LISTED + 2 + 2


def test_a_finished_run_of_an_earlier_version_stays_as_it_is() -> None:
    world = training()
    for stage in ("train", "publish"):
        world.pass_stage(stage)
    world.server.change(
        "InternVLFineTune", "run", lambda raw: [entry.pop("attempts") for entry in raw["status"]["stages"]]
    )
    before = len(world.server.writes)
    world.operator.settle()
    assert world.server.writes[before:] == []

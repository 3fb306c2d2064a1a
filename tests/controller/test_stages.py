"""A pipeline with every stage: who takes GPUs, what the figures become, and how a gate ends a run."""

from typing import Any

import pytest
from controller.builders import Raw, a_run, result
from controller.simulator import World
from internvl_api.constants import ENV_IMAGE, ExitCode
from internvl_api.status import InternVLFineTuneStatus, Progress
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.resources import pods
from internvl_operator.core.stages import Stage, pipeline
from internvl_operator.metrics import RunCollector

EVALUATION: Raw = {
    "tasks": {"coco": {"task": "caption-coco", "annotation": "s3://data/test.json", "root": "pvc://photos/val"}},
    "baseline": True,
    "publishIf": "CIDEr > baseline.CIDEr",
}
EVERYTHING: Raw = {
    "method": "lora",
    "evaluation": EVALUATION,
    "merge": {"formats": ["upstream"]},
    "doctor": {"enabled": True},
}
STAGES = (
    "preflight", "doctor", "baseline-evaluate", "baseline-score", "train", "evaluate", "score", "merge", "publish",
)  # fmt: skip
BASELINE, FINAL = {"coco": {"CIDEr": 0.8}}, {"coco": {"CIDEr": 1.3}}


def _pass(world: World, stage: str) -> None:
    figures = {"baseline-score": {"baseline": BASELINE}, "score": {"final": FINAL}}
    said: dict[str, Any] = {"evaluation": figures[stage]} if stage in figures else {}
    world.run(stage)
    world.end(stage, 0, result(stage, **said))


def _reach(world: World, stage: str) -> None:
    for earlier in STAGES[: STAGES.index(stage)]:
        _pass(world, earlier)
    world.run(stage)


def test_a_run_with_every_stage() -> None:
    world = World(**EVERYTHING)
    for stage in STAGES:
        assert world.status["stage"] == stage
        assert len(world.pods(stage)) == (2 if stage in ("doctor", "baseline-evaluate", "train", "evaluate") else 1)
        _pass(world, stage)
    assert world.status["phase"] == "Succeeded"
    assert [(entry["name"], entry["state"]) for entry in world.status["stages"]] == [(s, "Succeeded") for s in STAGES]
    assert all(entry["startedAt"] and entry["finishedAt"] for entry in world.status["stages"])
    assert world.status["evaluation"] == {"baseline": BASELINE, "final": FINAL}


def test_status_says_what_each_stage_made_and_where_it_is_now() -> None:
    world = World()
    world.pass_stage("preflight")
    world.run("train")
    world.end("train", 0, result("train", artifacts={"adapter": "s3://out/run/stages/train/adapter"}))
    assert world.status["artifacts"] == {"adapter": "s3://out/run/stages/train/adapter"}
    world.run("publish")
    world.end("publish", 0, result("publish", artifacts={"adapter": "s3://out/run/artifacts/adapter"}))
    assert world.status["artifacts"] == {"adapter": "s3://out/run/artifacts/adapter"}
    assert {entry["name"]: entry.get("artifacts", {}) for entry in world.status["stages"]} == {
        "preflight": {},
        "train": {"adapter": "s3://out/run/stages/train/adapter"},
        "publish": {"adapter": "s3://out/run/artifacts/adapter"},
    }


def test_a_warning_of_training_stays_with_its_stage() -> None:
    warning = "LossRises: the mean loss of 10 steps rose from 0.5 (up to step 10) to 5.75 (up to step 37)"
    world = World()
    world.pass_stage("preflight")
    world.run("train")
    world.end("train", 0, result("train", progress={"stage": "train", "step": 60, "warning": warning}))
    world.pass_stage("publish")
    assert world.status["phase"] == "Succeeded"
    said = {entry["name"]: entry.get("message") for entry in world.status["stages"]}
    assert said == {"preflight": None, "train": warning, "publish": None}
    assert world.status["progress"]["warning"] == warning


def test_early_stopping_and_the_best_step_stay_in_status() -> None:
    ended = "ended after step 8: none of the last 2 losses on data.validation is below the 1.9500 of step 4"
    best = {"bestStep": 4, "bestValidationLoss": 1.95, "exportedStep": 4, "endedEarly": ended}
    world = World()
    world.pass_stage("preflight")
    world.run("train")
    world.end("train", 0, result("train", progress={"stage": "train", "step": 8, "totalSteps": 40, **best}))
    world.pass_stage("publish")
    assert world.status["phase"] == "Succeeded"
    assert {name: world.status["progress"].get(name) for name in best} == best
    said = {entry["name"]: entry.get("message") for entry in world.status["stages"]}
    assert said["train"] == ended


def test_a_run_that_trains_again_has_no_best_step_yet() -> None:
    world = World()
    world.pass_stage("preflight")
    world.run("train")
    world.server.answers = {"run-train-0": Progress(stage="train", step=8, best_step=4, ended_early="ended")}
    world.operator.settle()
    assert world.status["progress"]["bestStep"] == 4
    world.server.answers = {"run-train-0": Progress(stage="train", step=1)}
    world.operator.settle()
    assert {"bestStep", "endedEarly"}.isdisjoint(world.status["progress"])


def test_figures_are_gauges_that_outlive_the_pods() -> None:
    world = World(**EVERYTHING)
    for stage in STAGES:
        _pass(world, stage)
    for name in list(world.server.pods):
        world.server.remove("Pod", name)
    status = InternVLFineTuneStatus.model_validate(world.status)
    found = {
        tuple(sample.labels[label] for label in ("model", "task", "metric")): sample.value
        for family in RunCollector(lambda: [("team", "run", status)]).collect()
        for sample in family.samples
        if sample.name == "internvl_job_evaluation"
    }
    assert found == {("baseline", "coco", "CIDEr"): 0.8, ("final", "coco", "CIDEr"): 1.3}


def test_a_result_below_the_condition_ends_the_run_and_keeps_what_was_made() -> None:
    world = World(**EVERYTHING)
    _reach(world, "score")
    refused = result(
        "score",
        "failed",
        "EvaluationBelowThreshold",
        message="CIDEr = 0.7000, baseline.CIDEr = 0.8000; publishIf: CIDEr > baseline.CIDEr",
        artifacts={"adapter": "s3://out/run/stages/train/adapter", "report": "s3://out/run/stages/score/report"},
        evaluation={"final": {"coco": {"CIDEr": 0.7}}},
    )
    world.end("score", ExitCode.REJECTED, refused)
    failed = world.server.condition("Failed")
    assert (failed["status"], failed["reason"]) == ("True", "EvaluationBelowThreshold")
    assert "CIDEr = 0.7000" in failed["message"]
    assert world.status["artifacts"]["report"].endswith("/report")
    assert world.status["evaluation"] == {"baseline": BASELINE, "final": {"coco": {"CIDEr": 0.7}}}
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}
    world.later(3600)
    assert world.pods("merge") == world.pods("publish") == []


def test_a_lower_condition_lets_a_refused_run_go_on() -> None:
    world = World(**EVERYTHING)
    _reach(world, "score")
    world.end("score", ExitCode.REJECTED, result("score", "failed", "EvaluationBelowThreshold"))
    world.server.edit_spec(evaluation=EVALUATION | {"publishIf": "CIDEr > 0.1"})
    world.operator.settle()
    world.collect()
    assert world.status["phase"] in ("Pending", "Running")
    for stage in STAGES:
        _pass(world, stage)  # the trainer finds all but the last ones done
        world.collect()
    assert world.status["phase"] == "Succeeded"


@pytest.mark.parametrize("stage", STAGES)
def test_only_what_works_in_parallel_takes_gpus(stage: Any) -> None:
    run = a_run(gpusPerWorker=4, training={"globalBatchSize": 8}, secrets={}, **EVERYTHING)
    built = pods.build(run, Stage(stage), 1, 0, OperatorConfig())
    (container,) = built["spec"]["containers"]
    parallel = stage in ("doctor", "baseline-evaluate", "train", "evaluate")
    assert container["resources"].get("limits", {}).get("nvidia.com/gpu") == ("4" if parallel else None)
    env = {item["name"]: item["value"] for item in container["env"]}
    assert env["WORLD_SIZE"] == ("8" if parallel else "1")
    assert env[ENV_IMAGE] == container["image"]
    assert {"name": "pvc-0", "mountPath": "/pvc/photos", "readOnly": True} in container["volumeMounts"]


def test_preflight_has_the_pods_that_share_its_rows_and_no_gpu() -> None:
    run = a_run(data={"train": {"photos": {"annotation": "s3://data/train.jsonl"}}, "preflight": {"workers": 3}})
    preflight = Stage("preflight")
    assert preflight.size(run.spec) == 3
    built = [pods.build(run, preflight, 1, rank, OperatorConfig())["spec"]["containers"][0] for rank in range(3)]
    envs = [{item["name"]: item.get("value") for item in container["env"]} for container in built]
    assert [(env["RANK"], env["WORLD_SIZE"]) for env in envs] == [("0", "3"), ("1", "3"), ("2", "3")]
    assert all("nvidia.com/gpu" not in container["resources"].get("limits", {}) for container in built)
    assert Stage("train").size(run.spec) == 2
    assert Stage("publish").size(run.spec) == 1


def test_the_pipeline_follows_the_spec() -> None:
    assert [stage.name for stage in pipeline(a_run().spec)] == ["preflight", "train", "publish"]
    assert [stage.title for stage in pipeline(a_run(**EVERYTHING).spec)][1:3] == ["Doctor", "BaselineEvaluate"]

"""A run that only evaluates, from the first pod to its figures: no training, no baseline, the usual retries."""

import io
from typing import Any

from controller.builders import Raw, result
from controller.simulator import World
from internvl_api.constants import ALREADY_PUBLISHED, ExitCode
from internvl_operator.kubectl_ivft import render
from rich.console import Console

FIGURES = {"pets": {"vqa_accuracy": 0.61}}
ALONE: Raw = {
    "method": "none",
    "data": {},
    "evaluation": {"tasks": {"pets": {"task": "vqa", "annotation": "s3://data/test.jsonl"}}},
}


def evaluate(world: World) -> None:
    world.pass_stage("preflight")
    world.run("evaluate")
    world.end("evaluate", 0, result("evaluate", evaluation={"final": FIGURES}))


def shown(world: World) -> str:
    text = io.StringIO()
    raw: Any = next(iter(world.server.objects["InternVLFineTune"].values()))
    Console(file=text, width=160).print(render.run_status(raw, world.server.now))
    return " ".join(text.getvalue().split())


def test_a_model_is_evaluated_and_its_figures_are_published() -> None:
    world = World(**ALONE)
    assert [entry["name"] for entry in world.status["stages"]] == ["preflight", "evaluate", "publish"]
    evaluate(world)
    assert world.status["evaluation"] == {"baseline": {}, "final": FIGURES}
    assert len(world.pods("evaluate")) == 2
    world.pass_stage("publish")
    assert world.status["phase"] == "Succeeded"
    assert [entry["state"] for entry in world.status["stages"]] == ["Succeeded"] * 3
    assert "TASK METRIC VALUE pets vqa_accuracy 0.6100" in shown(world)


def test_a_failed_evaluation_is_tried_again() -> None:
    world = World(**ALONE)
    world.pass_stage("preflight")
    world.run("evaluate")
    world.end("evaluate", ExitCode.INTERNAL, "boom")
    assert world.server.attempts("evaluate") == {"2"}
    assert world.status["restarts"]["user"] == 1
    world.run("evaluate")
    world.end("evaluate", 0, result("evaluate", evaluation={"final": FIGURES}))
    world.pass_stage("publish")
    assert world.status["phase"] == "Succeeded"
    (entry,) = [each for each in world.status["stages"] if each["name"] == "evaluate"]
    assert entry["attempt"] == 2


def test_what_preflight_refuses_stalls_until_it_is_corrected() -> None:
    world = World(**ALONE)
    world.run("preflight")
    world.end("preflight", ExitCode.USER_ERROR, result("preflight", "failed", "ImageMissing", message="a.jpg is gone"))
    assert world.status["phase"] == "Stalled"


def test_a_run_without_test_sets_stalls_and_starts_nothing() -> None:
    world = World(method="none", data={})
    assert world.status["phase"] == "Stalled"
    (stalled,) = [each for each in world.status["conditions"] if each["type"] == "Stalled"]
    assert stalled["message"].startswith("spec.evaluation.tasks: found none with method none")
    assert not world.server.pods


def test_results_that_are_there_end_the_run_at_once() -> None:
    world = World(**ALONE)
    world.run("preflight")
    world.end("preflight", 0, result("preflight", reason=ALREADY_PUBLISHED, evaluation={"final": FIGURES}))
    assert world.status["phase"] == "Succeeded"
    assert world.status["evaluation"] == {"baseline": {}, "final": FIGURES}
    (ready,) = [each for each in world.status["conditions"] if each["type"] == "Ready"]
    assert ready["message"].endswith("nothing was done again")


def test_figures_below_the_condition_fail_the_run() -> None:
    world = World(**ALONE | {"evaluation": ALONE["evaluation"] | {"publishIf": "vqa_accuracy > 0.7"}})
    world.pass_stage("preflight")
    world.run("evaluate")
    world.end("evaluate", ExitCode.REJECTED, result("evaluate", "failed", "EvaluationBelowThreshold"))
    assert world.status["phase"] == "Failed"

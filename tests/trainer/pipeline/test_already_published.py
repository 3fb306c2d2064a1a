"""Preflight of a run whose results are all in storage says so, and no other stage has to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from internvl_api.run_config import RunConfig
from internvl_api.status import StageResult
from internvl_trainer.metrics import Reporter
from internvl_trainer.stages.pipeline import run_stage
from trainer.artifacts.finished_run import leave_run
from trainer.contexts import store_of
from trainer.runs import make_config

ROW = {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}]}
PUBLISHED = {"model": "s3://out/run/artifacts/model"}


def a_config(folder: Path, **changes: Any) -> RunConfig:
    rows = folder / "rows.jsonl"
    rows.write_text(f"{json.dumps(ROW)}\n")
    tasks = {"coco": {"task": "caption-coco", "annotation": str(rows)}}
    evaluation = {"tasks": tasks, "baseline": True, **changes.pop("evaluation", {})}
    data = {"train": {"rows": {"annotation": str(rows)}}}
    return make_config(str(folder / "out"), data=data, evaluation=evaluation, **changes)


def publish(config: RunConfig) -> None:
    """What a run leaves behind whose resource is deleted."""
    stages = store_of(config)
    leave_run(stages.storage, config)
    stages.commit("publish", [], artifacts=PUBLISHED)


def preflight(config: RunConfig) -> StageResult:
    return run_stage("preflight", config, Reporter(config.job, "preflight"))


def test_a_published_run_is_recognised_with_its_figures(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    publish(config)
    found = preflight(config)
    assert (found.outcome, found.reason, found.artifacts) == ("succeeded", "AlreadyPublished", PUBLISHED)
    assert found.evaluation is not None
    assert (found.evaluation.final["coco"]["CIDEr"], found.evaluation.baseline["coco"]["CIDEr"]) == (1.31, 0.79)


def test_what_only_the_computation_knows_may_differ(tmp_path: Path) -> None:
    publish(a_config(tmp_path))
    assert preflight(a_config(tmp_path, workers=2)).reason == "AlreadyPublished"


@pytest.mark.parametrize("stage", ["baseline-evaluate", "baseline-score", "train", "evaluate", "score", "publish"])
def test_a_run_that_lacks_one_stage_goes_on(tmp_path: Path, stage: Any) -> None:
    config = a_config(tmp_path)
    publish(config)
    store_of(config).withdraw(stage)
    assert preflight(config).reason == "AlreadyDone"


@pytest.mark.parametrize(
    ("condition", "reason"), [("coco.CIDEr > 1.3", "AlreadyPublished"), ("coco.CIDEr > 1.4", "AlreadyDone")]
)
def test_a_stricter_condition_is_judged_by_evaluate(tmp_path: Path, condition: str, reason: str) -> None:
    publish(a_config(tmp_path))
    assert preflight(a_config(tmp_path, evaluation={"publishIf": condition})).reason == reason

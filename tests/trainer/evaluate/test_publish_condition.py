"""publishIf: what it lets pass, and what is left when it does not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from internvl_api.constants import ExitCode
from internvl_api.status import EvaluationStatus, StageResult
from internvl_trainer.errors import Rejected, UserError
from internvl_trainer.exit_status import conclude
from internvl_trainer.stage_store import StageStore
from internvl_trainer.stages.publish_condition import check_publish_condition
from trainer.contexts import store_of
from trainer.evaluations import evaluation_config, write_coco


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders that a report was asked for."""
    asked: list[str] = []

    def write_report(stages: StageStore, folder: str) -> str:
        asked.append(folder)
        return f"{stages.storage.uri}/{folder}/index.html"

    module = ModuleType("internvl_trainer.report.build")
    module.write_report = write_report  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "internvl_trainer.report", ModuleType("internvl_trainer.report"))
    monkeypatch.setitem(sys.modules, "internvl_trainer.report.build", module)
    return asked


def gated(folder: Path, condition: str | None, **sections: Any) -> StageStore:
    """A run with that condition, whose base model was evaluated: CIDEr 0.5."""
    task = {"task": "caption", "annotation": str(write_coco(folder, 1))}
    evaluation = {"publishIf": condition} if condition else {}
    config = evaluation_config(folder, {"coco": task}, evaluation=evaluation, **sections)
    stages = store_of(config)
    figures = EvaluationStatus(baseline={"coco": {"CIDEr": 0.5}}).to_dict()
    stages.commit("baseline-score", [], evaluation=figures)
    return stages


def measured(cider: float) -> StageResult:
    figures = EvaluationStatus(final={"coco": {"CIDEr": cider}})
    return StageResult(stage="score", outcome="succeeded", reason="Scored", evaluation=figures)


@pytest.mark.parametrize(
    ("condition", "cider"),
    [
        pytest.param(None, 0.0, id="no condition"),
        pytest.param("CIDEr >= 1.2", 1.2, id="just reached"),
        pytest.param("CIDEr > baseline.CIDEr", 0.51, id="better than the base model"),
        pytest.param("coco.CIDEr >= baseline.coco.CIDEr * 2", 1.0, id="twice as good"),
    ],
)
def test_good_enough(tmp_path: Path, reports: list[str], condition: str | None, cider: float) -> None:
    check_publish_condition(gated(tmp_path, condition), measured(cider))
    assert not reports


@pytest.mark.parametrize(("method", "kind"), [("lora", "adapter"), ("full", "model")])
def test_not_good_enough_keeps_what_was_made(tmp_path: Path, reports: list[str], method: str, kind: str) -> None:
    stages = gated(tmp_path, "CIDEr > baseline.CIDEr", method=method)
    with pytest.raises(Rejected) as refused:
        check_publish_condition(stages, measured(0.25))
    result = refused.value.result
    assert (result.stage, result.outcome, result.reason) == ("score", "failed", "EvaluationBelowThreshold")
    assert result.message.startswith(
        "CIDEr = 0.2500, baseline.CIDEr = 0.5000; publishIf: CIDEr > baseline.CIDEr; nothing is published"
    )
    assert result.artifacts == {
        kind: f"{tmp_path}/output/stages/train/{kind}",
        "report": f"{tmp_path}/output/stages/score/report/index.html",
    }
    assert result.evaluation == EvaluationStatus(baseline={"coco": {"CIDEr": 0.5}}, final={"coco": {"CIDEr": 0.25}})
    assert reports == ["stages/score/report"]


def test_the_exit_code_of_a_refusal(tmp_path: Path, reports: list[str]) -> None:
    stages = gated(tmp_path, "CIDEr >= 1.2")

    def work() -> StageResult:
        check_publish_condition(stages, measured(0.1))
        return measured(0.1)

    outcome = conclude("evaluate", work)
    assert outcome.code == ExitCode.REJECTED
    assert outcome.result.reason == "EvaluationBelowThreshold"


@pytest.mark.parametrize(
    ("condition", "cider", "message"),
    [
        pytest.param("CIDEr >= 1.2", float("nan"), "CIDEr is nan, expected a finite number", id="no number"),
        pytest.param("vqa_accuracy > 0.5", 1.0, "vqa_accuracy: found 0 such metrics, expected one", id="not measured"),
    ],
)
def test_a_condition_that_cannot_be_decided(
    tmp_path: Path, reports: list[str], condition: str, cider: float, message: str
) -> None:
    stages = gated(tmp_path, "CIDEr >= 1.2")
    config = stages.config
    evaluation = config.evaluation.model_copy(update={"publish_if": condition})
    changed = config.model_copy(update={"evaluation": evaluation})
    with pytest.raises(UserError, match=message) as refused:
        check_publish_condition(StageStore(changed, stages.storage), measured(cider))
    assert (refused.value.reason, refused.value.where) == ("ConditionUnusable", "spec.evaluation.publishIf")
    assert not reports

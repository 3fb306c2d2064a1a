"""spec.evaluation and the publishing condition."""

import re
from typing import Any

import pytest
from internvl_api import publish_condition
from internvl_api.pipeline import stage_names
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.validation.violations import SpecError

FINAL = {"coco": {"CIDEr": 1.2, "BLEU_4": 0.3}, "docs": {"exact_match": 0.5}}
BASELINE = {"coco": {"CIDEr": 0.8, "BLEU_4": 0.2}}


def _resolve(**changes: Any) -> Any:
    base = {
        "model": {"source": "s3://models/tiny"},
        "data": {"train": {"photos": {"annotation": "s3://data/train.jsonl"}}},
        "output": "s3://out/run",
    }
    return resolve(parse_spec(base | changes), job="team/run", job_uid="1")


def _task(kind: str = "caption-coco", **changes: Any) -> dict[str, Any]:
    return {"task": kind, "annotation": "s3://data/test.json"} | changes


@pytest.mark.parametrize(
    ("condition", "met"),
    [
        pytest.param("CIDEr >= 1.2", True, id="equal"),
        pytest.param("CIDEr > 1.2", False, id="strictly more"),
        pytest.param("CIDEr > baseline.CIDEr", True, id="better than the base model"),
        pytest.param("CIDEr > baseline.CIDEr * 1.5", False, id="half as much again"),
        pytest.param("CIDEr - baseline.CIDEr >= 0.3", True, id="a difference"),
        pytest.param("coco.BLEU_4 >= 0.3 and docs.exact_match < 0.5", False, id="and"),
        pytest.param("CIDEr > 9 or CIDEr > 1 and BLEU_4 > 0.1", True, id="and binds closer than or"),
        pytest.param("CIDEr>1  or  CIDEr>2", True, id="spaces"),
        pytest.param("1 < CIDEr", True, id="a number first"),
    ],
)
def test_condition(condition: str, met: bool) -> None:
    found, words = publish_condition.holds(condition, FINAL, BASELINE)
    assert found is met
    assert condition.strip() in words


def test_condition_says_what_it_compared() -> None:
    assert publish_condition.holds("CIDEr > baseline.CIDEr", FINAL, BASELINE)[1] == (
        "CIDEr = 1.2000, baseline.CIDEr = 0.8000; publishIf: CIDEr > baseline.CIDEr"
    )


def test_not_a_number_is_never_compared() -> None:
    with pytest.raises(publish_condition.ConditionError, match="CIDEr is nan"):
        publish_condition.holds("CIDEr > 1", {"coco": {"CIDEr": float("nan")}}, {})


@pytest.mark.parametrize(
    "condition",
    ["", "CIDEr", "SPICE > 1", "CIDEr > ", "__import__('os') > 1", "(CIDEr > 1)", "CIDEr > 1; CIDEr", "CIDEr == 1",
     "CIDEr > 1 and", "a.b.CIDEr > 1", "CIDEr > 1 + 2 + 3"],
)  # fmt: skip
def test_what_is_no_condition_is_refused_by_the_schema(condition: str) -> None:
    assert not re.match(publish_condition.CONDITION_PATTERN, condition)
    with pytest.raises(SpecError, match=r"spec\.evaluation\.publishIf"):
        _resolve(evaluation={"tasks": {"coco": _task()}, "publishIf": condition})


def test_lengths_are_those_of_the_task_unless_given() -> None:
    tasks = {"a": _task(), "b": _task("vqa"), "c": _task(maxNewTokens=5), "d": _task("grounding", minNewTokens=0)}
    found = _resolve(evaluation={"tasks": tasks}).evaluation.tasks
    assert {name: (task.min_new_tokens, task.max_new_tokens) for name, task in found.items()} == {
        "a": (8, 30), "b": (1, 10), "c": (5, 5), "d": (0, 100),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        pytest.param({}, "preflight train publish", id="as little as possible"),
        pytest.param(
            {"evaluation": {"tasks": {"a": _task()}, "baseline": True}, "method": "lora", "merge": {"formats": ["hf"]}},
            "preflight baseline-evaluate train evaluate merge publish",
            id="everything",
        ),
        pytest.param({"merge": {"formats": ["upstream"]}}, "preflight train publish", id="full is whole already"),
        pytest.param({"merge": {"formats": ["hf"]}}, "preflight train merge publish", id="full, for transformers"),
    ],
)
def test_stages(changes: dict[str, Any], stages: str) -> None:
    run = _resolve(**changes)
    assert stage_names(run.method, run.evaluation, run.merge) == tuple(stages.split())


def test_a_hub_repository_needs_a_token() -> None:
    hub = {"hub": {"repository": "team/model"}}
    with pytest.raises(SpecError, match=r"spec\.secrets\.huggingFace: required because publish\.hub is team/model"):
        _resolve(publish=hub)
    assert _resolve(publish=hub, secrets={"huggingFace": "hf-token"}).publish.hub.repository == "team/model"

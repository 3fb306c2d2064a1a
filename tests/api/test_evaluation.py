"""spec.evaluation and the publishing condition."""

import re
from typing import Any

import pytest
from internvl_api import publish_condition
from internvl_api.pipeline import stage_names
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.run_config import RunConfig
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


@pytest.mark.parametrize("rank", ["R1", "R5", "R10"])
def test_a_metric_is_not_taken_for_one_whose_name_begins_the_same(rank: str) -> None:
    name = f"G_text_to_image_{rank}"
    figures = {"flickr": {"G_text_to_image_R1": 0.1, "G_text_to_image_R5": 0.5, "G_text_to_image_R10": 0.9}}
    assert (
        publish_condition.holds(f"{name} > 0", figures, {})[1]
        == f"{name} = {figures['flickr'][name]:.4f}; publishIf: {name} > 0"
    )


@pytest.mark.parametrize(
    ("condition", "met"),
    [
        pytest.param("distinct_answers > 0.2 and CIDEr > baseline.CIDEr", False, id="collapsed"),
        pytest.param("empty_answers < 0.05 and repetition < 0.1 and answers_at_limit <= 0.25", True, id="the others"),
        pytest.param("coco.distinct_answers >= baseline.coco.distinct_answers", False, id="than the base model"),
    ],
)
def test_answers_count_in_a_condition(condition: str, met: bool) -> None:
    tasks = {"coco": _task()}
    _resolve(evaluation={"tasks": tasks, "publishIf": condition, "baseline": True})
    final = {"CIDEr": 1.2, "distinct_answers": 0.1, "empty_answers": 0.0, "repetition": 0.0, "answers_at_limit": 0.0}
    found, _ = publish_condition.holds(condition, {"coco": final}, {"coco": {"CIDEr": 0.8, "distinct_answers": 1.0}})
    assert found is met


def test_a_task_without_texts_has_no_figures_of_them() -> None:
    with pytest.raises(SpecError, match="found repetition, which no task measures"):
        _resolve(
            model={"source": "s3://models/g", "name": "InternVL-14B-224px"},
            data={"train": {"f": {"annotation": "s3://data/train.csv", "format": "flickr"}}},
            evaluation={"tasks": {"f": _task("retrieval-flickr30k")}, "publishIf": "repetition < 1"},
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
            "preflight baseline-evaluate baseline-score train evaluate score merge publish",
            id="everything",
        ),
        pytest.param(
            {"evaluation": {"tasks": {"a": _task("vqa")}, "baseline": True}},
            "preflight baseline-evaluate train evaluate publish",
            id="only captions are scored apart",
        ),
        pytest.param({"merge": {"formats": ["upstream"]}}, "preflight train publish", id="full is whole already"),
        pytest.param({"merge": {"formats": ["hf"]}}, "preflight train merge publish", id="full, for transformers"),
    ],
)
def test_stages(changes: dict[str, Any], stages: str) -> None:
    run = _resolve(**changes)
    assert stage_names(run) == tuple(stages.split())


def test_a_hub_repository_needs_a_token() -> None:
    hub = {"hub": {"repository": "team/model"}}
    with pytest.raises(SpecError, match=r"spec\.secrets\.huggingFace: required because publish\.hub is team/model"):
        _resolve(publish=hub)
    assert _resolve(publish=hub, secrets={"huggingFace": "hf-token"}).publish.hub.repository == "team/model"


@pytest.mark.parametrize(
    "section",
    [
        pytest.param({"evaluation": {"everySteps": 5}}, id="everySteps"),
        pytest.param({"training": {"earlyStopping": {}}}, id="earlyStopping"),
        pytest.param({"checkpoint": {"keepBest": True}}, id="keepBest"),
        pytest.param({"training": {"samples": {}}}, id="samples"),
    ],
)
@pytest.mark.parametrize(
    ("data", "is_right"),
    [
        pytest.param({}, False, id="no held-out rows"),
        pytest.param({"validation": {"held": {"annotation": "s3://data/val.jsonl"}}}, True, id="validation"),
        pytest.param({"validationMeta": "s3://data/val.json"}, True, id="validationMeta"),
    ],
)
def test_what_looks_at_held_out_rows_needs_some(section: dict[str, Any], data: dict[str, Any], is_right: bool) -> None:
    train = {"train": {"photos": {"annotation": "s3://data/train.jsonl"}}}
    if is_right:
        written = _resolve(**section, data=train | data).to_dict()
        without = written | {"data": {name: value for name, value in written["data"].items() if name not in data}}
        with pytest.raises(ValueError, match=r"needs data\.validation, which is empty"):
            RunConfig.model_validate(without)
    else:
        with pytest.raises(SpecError, match=r"needs data\.validation, which is empty"):
            _resolve(**section, data=train | data)

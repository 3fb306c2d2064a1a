"""Mistakes under spec.evaluation, spec.merge and spec.publish: what the schema refuses, and what the operator says."""

from typing import Any

import pytest
from crd_server import rule_messages, schema_errors
from internvl_api.resolve import SpecError, parse_spec, resolve

MINIMAL: dict[str, Any] = {
    "model": {"source": "s3://models/tiny"},
    "data": {"train": {"pets": {"annotation": "s3://data/pets.jsonl"}}},
    "output": "s3://models/out",
}
TASK = {"task": "caption-coco", "annotation": "s3://data/test.json"}
TOKEN = {"huggingFace": "hf-token"}


def tasks(**changes: Any) -> dict[str, Any]:
    return {"evaluation": {"tasks": {"coco": TASK | changes}}}


def condition(text: str) -> dict[str, Any]:
    return {"evaluation": {"tasks": {"coco": TASK}, "baseline": True, "publishIf": text}}


def hub(**fields: Any) -> dict[str, Any]:
    return {"publish": {"hub": {"repository": "team/model"} | fields}, "secrets": TOKEN}


def explanation(changes: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as caught:
        resolve(parse_spec(MINIMAL | changes), job="team/run", job_uid="1")
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        pytest.param(tasks(task="caption-vizwiz"), "evaluation.tasks.coco.task", "'grounding'", id="unknown task"),
        pytest.param(
            {"evaluation": {"tasks": {"coco": {"task": "vqa"}}}},
            "evaluation.tasks.coco.annotation",
            "Field required",
            id="no annotation",
        ),
        pytest.param(
            tasks(annotation="data/test.json"), "evaluation.tasks.coco.annotation", "'data/test.json'", id="no scheme"
        ),
        pytest.param(tasks(root="ftp://host/x"), "evaluation.tasks.coco.root", "'ftp://host/x'", id="unknown scheme"),
        pytest.param(tasks(prompt=""), "evaluation.tasks.coco.prompt", "at least 1 character", id="empty prompt"),
        pytest.param(tasks(maxNewTokens=0), "evaluation.tasks.coco.maxNewTokens", "found 0", id="no new token"),
        pytest.param(
            tasks(maxNewTokens=5000), "evaluation.tasks.coco.maxNewTokens", "found 5000", id="too many tokens"
        ),
        pytest.param(tasks(minNewTokens=-1), "evaluation.tasks.coco.minNewTokens", "found -1", id="negative length"),
        pytest.param(tasks(limit=0), "evaluation.tasks.coco.limit", "found 0", id="no rows"),
        pytest.param(tasks(maxDynamicPatch=65), "evaluation.tasks.coco.maxDynamicPatch", "found 65", id="many tiles"),
        pytest.param(
            {"evaluation": {"tasks": {"coco": "caption-coco"}}}, "evaluation.tasks.coco", "'caption-coco'", id="a word"
        ),
        pytest.param({"evaluation": {"tasks": ["caption-coco"]}}, "evaluation.tasks", "['caption-coco']", id="a list"),
        pytest.param({"evaluation": {"batchSize": 0}}, "evaluation.batchSize", "found 0", id="no batch"),
        pytest.param({"evaluation": {"everySteps": 0}}, "evaluation.everySteps", "found 0", id="every no steps"),
        pytest.param(
            condition("SPICE > 0.2"), "evaluation.publishIf", "no metric is called 'SPICE'; write", id="unknown metric"
        ),
        pytest.param(
            condition("cider > 1"),
            "evaluation.publishIf",
            "'cider' (did you mean 'CIDEr'?)",
            id="a metric in the wrong case",
        ),
        pytest.param(condition("CIDEr >= 1,2"), "evaluation.publishIf", "'CIDEr >= 1,2'", id="a decimal comma"),
        pytest.param(condition("CIDEr"), "evaluation.publishIf", "'CIDEr'", id="nothing compared"),
        pytest.param(condition("exec('x') > 1"), "evaluation.publishIf", "exec", id="code"),
        pytest.param({"merge": {"formats": ["gguf"]}}, "merge.formats.0", "'upstream' or 'hf'", id="unknown format"),
        pytest.param({"merge": {"formats": "hf"}}, "merge.formats", "found 'hf'", id="a format without a list"),
        pytest.param(hub(repository="model"), "publish.hub.repository", "'model'", id="no owner"),
        pytest.param(
            hub(repository="https://huggingface.co/team/model"), "publish.hub.repository", "https", id="a URL"
        ),
        pytest.param(hub(revision="-x"), "publish.hub.revision", "'-x'", id="a revision that is an option"),
        pytest.param(
            {"publish": {"hub": {"private": True}}, "secrets": TOKEN},
            "publish.hub.repository",
            "Field required",
            id="no repository",
        ),
    ],
)
def test_schema_and_operator_name_the_field(changes: dict[str, Any], field: str, said: str) -> None:
    message = explanation(changes)
    assert message.startswith(f"spec.{field}: ")
    assert said in message
    assert any(f"{field}.".startswith(f"{path}.") for path in schema_errors(MINIMAL | changes)), (
        "the server refuses it too"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"evaluation": {"task": {"coco": TASK}}},
            "spec.evaluation.task: there is no such field (did you mean 'tasks'?)",
            id="a field in the singular",
        ),
        pytest.param(
            tasks(metric="CIDEr"), "spec.evaluation.tasks.coco.metric: there is no such field", id="a metric asked for"
        ),
        pytest.param(
            {"merge": {"format": "hf"}},
            "spec.merge.format: there is no such field (did you mean 'formats'?)",
            id="format for formats",
        ),
        pytest.param(hub(token="hf_abc"), "spec.publish.hub.token: there is no such field", id="a token in the open"),
    ],
)
def test_a_field_there_is_none_of_is_named(changes: dict[str, Any], message: str) -> None:
    """A server drops such a field, or refuses it when the user asks for strict validation."""
    assert explanation(changes).startswith(message)
    assert "hf_abc" not in explanation(changes)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        pytest.param(
            {"tasks": {"coco": TASK}, "publishIf": "flickr.CIDEr > 1"},
            "found flickr.CIDEr, which no task measures; tasks: coco (BLEU_1, BLEU_2, BLEU_3, BLEU_4, METEOR, ROUGE_L, "
            "CIDEr)",
            id="a task there is none of",
        ),
        pytest.param(
            {"tasks": {"coco": TASK, "own": TASK | {"task": "caption"}}, "publishIf": "own.CIDEr > 1 and CIDEr > 1"},
            "found CIDEr, which 2 tasks measure; write coco.CIDEr",
            id="two tasks measure it",
        ),
        pytest.param(
            {"tasks": {"coco": TASK}, "baseline": True, "publishIf": "coco.box_accuracy > baseline.coco.box_accuracy"},
            "found coco.box_accuracy, which no task measures",
            id="a metric of another kind of task",
        ),
    ],
)
def test_a_condition_that_cannot_be_weighed_is_explained(evaluation: dict[str, Any], message: str) -> None:
    assert explanation({"evaluation": evaluation}).startswith(f"spec.evaluation.publishIf: {message}")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(tasks(), id="one task"),
        pytest.param(
            condition("CIDEr >= 1.2 and coco.BLEU_4 > baseline.BLEU_4 + 0.05 or METEOR > 0.3"), id="condition"
        ),
        pytest.param({"merge": {"formats": ["upstream", "hf"]}}, id="both formats"),
        pytest.param({"merge": {"formats": []}}, id="no format"),
        pytest.param(hub(revision="v1.0", private=False), id="a Hub repository"),
    ],
)
def test_what_is_meant_to_be_written_is_accepted(changes: dict[str, Any]) -> None:
    assert schema_errors(MINIMAL | changes) == rule_messages(MINIMAL | changes) == []
    resolve(parse_spec(MINIMAL | changes), job="team/run", job_uid="1")

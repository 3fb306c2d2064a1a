"""The CRD's cross-field rules, evaluated as CEL: what they let through. What they refuse: test_wrong_resources.py."""

import re
from typing import Any

import pytest
from crd_evaluator import RULES, TRANSITIONS, PlacedRule, refusal, rule_messages, schema_errors
from internvl_api.crd import root_schema
from internvl_api.recipes.resolve import parse_spec, resolve

DATA = {"train": {"pets": {"annotation": "s3://data/pets.jsonl"}}}
MINIMAL: dict[str, Any] = {"model": {"source": "s3://models/tiny"}, "data": DATA, "output": "s3://models/out"}
CAPTIONS = {"task": "caption", "annotation": "s3://data/test.jsonl"}
HUB = {"hub": {"repository": "team/model"}}


def evaluation(**fields: Any) -> dict[str, Any]:
    return {"evaluation": {"tasks": {"photos": CAPTIONS}} | fields}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="minimal"),
        pytest.param({"recipe": "internvl2-2b-lora-coco", "model": {}}, id="a recipe names the model"),
        pytest.param({"data": {"meta": "s3://data/meta.json"}}, id="a meta file alone"),
        pytest.param(evaluation(publishIf="CIDEr > baseline.CIDEr", baseline=True), id="better than before"),
        pytest.param(
            {"evaluation": {"tasks": {"mybaseline": CAPTIONS}, "publishIf": "mybaseline.CIDEr > 1", "baseline": False}},
            id="a task whose name ends in baseline",
        ),
        pytest.param(
            {"evaluation": {"tasks": {"few": CAPTIONS | {"minNewTokens": 3, "maxNewTokens": 3}}}}, id="one length"
        ),
        pytest.param({"publish": HUB, "secrets": {"huggingFace": "hf-token"}}, id="a Hub repository with a token"),
        pytest.param(
            {"publish": HUB, "podTemplate": {"env": [{"name": "HF_TOKEN", "value": "from-elsewhere"}]}},
            id="a token the user mounts",
        ),
        pytest.param({"training": {"packing": {"enabled": True}}}, id="packed"),
        pytest.param({"training": {"learningRate": 4.0e-5, "zeroStage": 3}}, id="some training"),
        pytest.param({"podTemplate": {"tolerations": [{"key": "gpu", "operator": "Exists"}]}}, id="pass-through"),
        pytest.param(
            {
                "evaluation": {
                    "tasks": {"coco": CAPTIONS},
                    "baseline": True,
                    "publishIf": "CIDEr >= 1.2 and coco.BLEU_4 > baseline.BLEU_4 + 0.05 or METEOR > 0.3",
                }
            },
            id="a long condition",
        ),
        pytest.param({"merge": {"formats": ["upstream", "hf"]}}, id="both formats"),
        pytest.param({"merge": {"formats": []}}, id="no format"),
        pytest.param(
            {"recipe": "internvl2-2b-lora-coco", "model": {"name": "InternVL2-1B"}, "lora": {"languageRank": 8}},
            id="a recipe for another model of its kind",
        ),
        pytest.param(
            {"recipe": "internvl2-2b-lora-coco", "method": "full", "training": {"freeze": {"language": False}}},
            id="a LoRA recipe in full",
        ),
    ],
)
def test_what_can_be_run_is_refused_by_neither(changes: dict[str, Any]) -> None:
    spec = MINIMAL | changes
    assert schema_errors(spec) == rule_messages(spec) == []
    resolve(parse_spec(spec), job="team/run", job_uid="1")


CHECKPOINT = {"checkpoint": {"step": 5, "uri": "s3://models/out/checkpoints/5"}}


@pytest.mark.parametrize(
    ("status", "output", "refused"),
    [
        pytest.param(None, "s3://models/new", False, id="nothing has begun"),
        pytest.param({"phase": "Stalled"}, "s3://models/new", False, id="an output that could not be used"),
        pytest.param(CHECKPOINT, "s3://models/new", True, id="checkpoints would be left behind"),
        pytest.param(CHECKPOINT, MINIMAL["output"], False, id="another field changes"),
    ],
)
def test_the_output_stays_while_it_holds_checkpoints(status: Any, output: str, refused: bool) -> None:
    (placed,) = TRANSITIONS
    old = {"spec": MINIMAL} | ({"status": status} if status else {})
    new = old | {"spec": MINIMAL | {"output": output, "workers": 2}}
    told = refusal(placed.rule, new, old)
    assert placed.rule["fieldPath"] == ".spec.output"
    assert told == (
        "cannot change while it holds this run's checkpoints; create another resource to start over there "
        "(found 's3://models/new', expected 's3://models/out')"
        if refused
        else ""
    )


@pytest.mark.parametrize(
    "placed", [pytest.param(placed, id=placed.rule["rule"][:60]) for placed in (*RULES, *TRANSITIONS)]
)
def test_a_rule_speaks_only_of_fields_that_have_a_schema(placed: PlacedRule) -> None:
    """A server compiles rules against the schema: one that names anything else makes it refuse the whole CRD."""
    here = root_schema()
    for step in placed.at.replace("[]", ".[]").split(".") if placed.at else ():
        values = "items" if "items" in here else "additionalProperties"
        here = here[values] if step == "[]" else here["properties"][step]
    words = f"{placed.rule['rule']} {placed.rule.get('messageExpression', '')} self{placed.rule.get('fieldPath', '')}"
    for chain in re.findall(r"\b(?:self|oldSelf(?:\.value\(\))?)((?:\.\??\w+\b(?!\())+)", words):
        schema = here
        for step in re.findall(r"\w+", chain):
            schema = schema["properties"][step]

"""The CRD's cross-field rules, evaluated as CEL, beside what the operator says to the same spec."""

import re
from typing import Any

import cel
import pytest
from crd_server import RULES, SCHEMA, rule_messages
from internvl_api.crd import build_crd
from internvl_api.resolve import SpecError, parse_spec, resolve

DATA = {"train": {"pets": {"annotation": "s3://data/pets.jsonl"}}}
MINIMAL: dict[str, Any] = {"model": {"source": "s3://models/tiny"}, "data": DATA, "output": "s3://models/out"}
CAPTIONS = {"task": "caption", "annotation": "s3://data/test.jsonl"}
HUB = {"hub": {"repository": "team/model"}}


def evaluation(**fields: Any) -> dict[str, Any]:
    return {"evaluation": {"tasks": {"photos": CAPTIONS}} | fields}


@pytest.mark.parametrize(
    ("changes", "refusal", "explanation"),
    [
        pytest.param(
            {"data": {"validation": {}}},
            "spec.data: name at least one dataset in train, or a meta file",
            "spec.data: found neither train nor meta",
            id="no data",
        ),
        pytest.param(
            {"model": {}},
            "spec.model: without a recipe, give name or source",
            "spec.model: found neither name nor source",
            id="no model",
        ),
        pytest.param(
            {"image": {"minDynamicPatch": 7, "maxDynamicPatch": 6}},
            "spec.image.minDynamicPatch must not exceed maxDynamicPatch",
            "spec.image: minDynamicPatch 7 exceeds",
            id="tile bounds crossed",
        ),
        pytest.param(
            {"workers": 2, "gpusPerWorker": 4, "training": {"globalBatchSize": 12, "microBatchSize": 1}},
            "spec.training.globalBatchSize must be a multiple of workers x processes x microBatchSize",
            "spec.training.globalBatchSize: found 12",
            id="batch not divisible",
        ),
        pytest.param(
            {"data": {**DATA, "maxBadRows": 3}},
            "spec.data.maxBadRows needs badRows: skip",
            "spec.data: maxBadRows needs badRows: skip",
            id="a budget without skip",
        ),
        pytest.param(
            {"training": {"packing": {"enabled": True}, "groupByLength": True}},
            "spec.training.groupByLength has no use with packing.enabled",
            "spec.training: groupByLength has no use",
            id="packed and grouped",
        ),
        pytest.param(
            {"evaluation": {"publishIf": "CIDEr > 1"}},
            "spec.evaluation.publishIf needs evaluation.tasks, whose figures it compares",
            "spec.evaluation.publishIf: found CIDEr, which no task measures",
            id="a condition without tasks",
        ),
        pytest.param(
            evaluation(publishIf="CIDEr > 1 and CIDEr > baseline.photos.CIDEr"),
            "spec.evaluation.publishIf names a figure of the base model; set evaluation.baseline to true",
            "spec.evaluation.publishIf: found baseline.photos.CIDEr, but evaluation.baseline is false",
            id="a condition on a baseline that is not measured",
        ),
        pytest.param(
            {"evaluation": {"tasks": {"baseline": CAPTIONS}}},
            "spec.evaluation.tasks: no task may be called baseline, as publishIf names tasks",
            "spec.evaluation.tasks: found the task name 'baseline'",
            id="a task called baseline",
        ),
        pytest.param(
            {"evaluation": {"tasks": {"photos": CAPTIONS, "few": CAPTIONS | {"minNewTokens": 9, "maxNewTokens": 3}}}},
            "spec.evaluation.tasks: minNewTokens must not exceed maxNewTokens",
            "spec.evaluation.tasks.few.minNewTokens: found 9, which is more than maxNewTokens 3",
            id="answer lengths crossed",
        ),
        pytest.param(
            {"publish": HUB, "secrets": {"objectStorage": "s3"}},
            "spec.publish.hub needs secrets.huggingFace: the name of a Secret with the key HF_TOKEN",
            "spec.secrets.huggingFace: found none, but spec.publish.hub names team/model",
            id="a Hub repository without a token",
        ),
        pytest.param(
            {"scheduling": {"gang": "kueue"}},
            "spec.scheduling.queue: gang: kueue needs the name of a LocalQueue",
            "spec.scheduling: gang: kueue needs queue",
            id="kueue without a queue",
        ),
    ],
)
def test_server_and_operator_refuse_the_same(changes: dict[str, Any], refusal: str, explanation: str) -> None:
    spec = MINIMAL | changes
    assert rule_messages(spec) == [refusal]
    with pytest.raises(SpecError) as caught:
        resolve(parse_spec(spec), job="team/run", job_uid="1")
    assert str(caught.value).startswith(explanation)


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
    ],
)
def test_what_can_be_run_is_refused_by_neither(changes: dict[str, Any]) -> None:
    spec = MINIMAL | changes
    assert rule_messages(spec) == []
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
    (transition,) = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["x-kubernetes-validations"]
    old = {"spec": MINIMAL} | ({"status": status} if status else {})
    new = old | {"spec": MINIMAL | {"output": output, "workers": 2}}
    assert cel.evaluate(transition["rule"], {"self": new, "oldSelf": old}) is not refused


@pytest.mark.parametrize("rule", [pytest.param(rule["rule"], id=rule["message"]) for rule in RULES])
def test_a_rule_speaks_only_of_fields_that_have_a_schema(rule: str) -> None:
    """A server compiles rules against the schema: one that names anything else makes it refuse the whole CRD."""
    for chain in re.findall(r"\bself((?:\.\w+\b(?!\()|\[\w+\])+)", rule):
        schema = SCHEMA
        for step in re.findall(r"\.\w+|\[\w+\]", chain):
            schema = schema["additionalProperties"] if step[0] == "[" else schema["properties"][step[1:]]


def test_every_rule_is_seen_to_refuse() -> None:
    table = next(mark for mark in test_server_and_operator_refuse_the_same.pytestmark if mark.name == "parametrize")
    assert {case.values[1] for case in table.args[1]} == {rule["message"] for rule in RULES}

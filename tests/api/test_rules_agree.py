"""A rule's CEL and its Python check refuse the same specs in the same words.

CEL sees only what the user writes: where a recipe or a default decides, Python alone refuses.
"""

import re
from typing import Any

import pytest
from api.test_wrong_resources import RIGHT, TABLE, resource
from crd_evaluator import TRANSITIONS, refusal, rule_messages, schema_errors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from internvl_api.models.catalogue import CATALOGUE
from internvl_api.recipes.files import recipe_names, with_recipe
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.run_config import RunConfig
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.validation.cel_rules import Rule, broken
from internvl_api.validation.check import RULES, check_spec
from internvl_api.validation.cluster import InCluster

Raw = dict[str, Any]


def said_by_cel(spec: Raw) -> list[str]:
    return sorted(re.sub(r"\[([a-z]\w*)\]", r".\1", message) for message in rule_messages(spec))


def said_by_python(spec: Raw) -> list[str]:
    """What the Python checks of the rules say; an unknown recipe hides all others."""
    if spec.get("recipe") not in (None, *recipe_names()):
        found = check_spec(spec).violations
    else:
        found = tuple(broken(RULES, InternVLFineTuneSpec.model_validate(with_recipe(spec))))
    return sorted(f"{each.field}: {each.message}" for each in found)


def without_hint(message: str) -> str:
    """Python has a hint for more typing errors than CEL."""
    message = re.sub(r"(not a condition): no metric is called .*(; write)", r"\1\2", message)
    return re.sub(r"did you mean '[^']*'\? (Remove)?", lambda match: (match[1] or "").lower(), message)


def agree(cel: list[str], python: list[str]) -> bool:
    return len(cel) == len(python) and all(c in (p, without_hint(p)) for c, p in zip(cel, python, strict=True))


@pytest.mark.parametrize("row", [pytest.param(row, id=row["case"]) for row in TABLE if "rule" in row])
def test_they_agree_on_the_table(row: Raw) -> None:
    spec = resource(row)["spec"]
    cel, python = said_by_cel(spec), said_by_python(spec)
    assert agree(cel, python), (cel, python)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Raw]:
    return st.fixed_dictionaries({}, optional=fields)


def misspelt(names: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Names as they are, cut, continued, in another case, or with another letter."""
    changes = (str, str.lower, str.upper, lambda name: name[:-2], lambda name: f"{name}x", lambda name: f"q{name[1:]}")
    return st.builds(lambda change, name: change(name), st.sampled_from(changes), st.sampled_from(names))


small = st.integers(0, 20)
tasks = st.dictionaries(
    st.sampled_from(["coco", "docs", "baseline", "mybaseline"]),
    some(minNewTokens=small, maxNewTokens=small).map(
        lambda lengths: {"task": "caption-coco", "annotation": "s3://data/test.json"} | lengths
    ),
    max_size=2,
)
conditions = st.sampled_from(
    ["CIDEr > 1", "CIDEr > baseline.CIDEr", "coco.CIDEr > 1 and BLEU_4 > baseline.coco.BLEU_4", "cider > 1", "CIDEr",
     "mybaseline.CIDEr > 1", "mybaseline.CIDEr > baseline.BLEU_4", "baseline.SPICE > 1", "baseline. > 1",
     "CIDEr == 1.2", "it's > 1", 'CIDEr > "1"', "", "{} > 1", "%s > %d",
     "baseline.METEOR<2 or docs.CIDEr>=baseline.CIDEr*1.5"]
)  # fmt: skip
DATASETS = st.dictionaries(
    st.sampled_from(["pets", "cars", "docs"]),
    some(weight=st.integers(1, 9)).map(lambda weight: {"annotation": "s3://data/pets.jsonl"} | weight),
    max_size=3,
)
specs = st.fixed_dictionaries(
    {
        "model": some(name=misspelt(tuple(CATALOGUE)), source=st.just("s3://models/tiny")),
        "data": some(
            train=DATASETS, validation=DATASETS, meta=st.just("s3://data/meta.json"), maxBadRows=small,
            validationMeta=st.just("s3://data/held.json"),
            mixingTemperature=st.integers(1, 9),
            badRows=st.sampled_from(["fail", "skip"]),
            compat=st.sampled_from(["default", "upstream"]),
        ),
        "output": st.just("s3://models/out"),
    },
    optional={
        "recipe": misspelt(("internvl2-2b-lora", "internvl2-2b-lora-coco", "internvl2-5-78b-full")),
        "image": some(minDynamicPatch=small, maxDynamicPatch=small),
        "workers": small,
        "gpusPerWorker": st.integers(0, 8),
        "training": some(
            globalBatchSize=st.integers(1, 64), microBatchSize=st.integers(1, 6), groupByLength=st.booleans(),
            maxSeqLength=st.integers(16, 64), warmupSteps=small, maxSteps=small,
            zeroStage=st.integers(1, 3),
            samples=some(rows=st.integers(1, 16)),
            maxTokensPerMicroBatch=st.integers(16, 64),
            earlyStopping=some(patience=st.integers(1, 9)),
            packing=some(enabled=st.booleans(), maxTokens=st.integers(16, 64)),
        ),
        "scheduling": some(gang=st.sampled_from(["kueue", "volcano", "coscheduling"]), queue=st.just("team-a")),
        "evaluation": some(tasks=tasks, baseline=st.booleans(), publishIf=conditions, everySteps=small),
        "method": st.sampled_from(["full", "none"]),
        "lora": some(languageRank=st.integers(1, 8)),
        "merge": some(formats=st.just(["hf"])),
        "checkpoint": some(keepBest=st.booleans()),
        "publish": some(hub=st.just({"repository": "team/model"})),
        "secrets": some(huggingFace=st.just("hf-token")),
        "podTemplate": some(env=st.lists(st.sampled_from([{"name": "HF_TOKEN", "value": "x"}, {"name": "A"}]))),
    },
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(specs)
def test_what_cel_refuses_python_refuses_in_the_same_words(spec: Raw) -> None:
    assume(not schema_errors(spec))
    cel, python = said_by_cel(spec), said_by_python(spec)
    if spec.get("recipe") not in (None, *recipe_names()):  # which hides all others
        cel = [message for message in cel if message.startswith("spec.recipe")]
    refused = [*python, *map(without_hint, python)]
    assert [message for message in cel if message not in refused] == []


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(specs)
def test_they_agree_where_every_field_is_written(spec: Raw) -> None:
    spec.pop("recipe", None)
    spec["image"] = {"minDynamicPatch": 2, "maxDynamicPatch": 2} | spec.get("image", {})
    training = spec.setdefault("training", {})
    spec["training"] = {"maxSeqLength": 32} | training | {"packing": {"maxTokens": 32} | training.get("packing", {})}
    for task in spec.get("evaluation", {}).get("tasks", {}).values():
        task.setdefault("minNewTokens", 2)
        task.setdefault("maxNewTokens", 4)
    assume(not schema_errors(spec))
    cel, python = said_by_cel(spec), said_by_python(spec)
    assert agree(cel, python), (cel, python)


def test_every_rule_has_a_row_in_the_table() -> None:
    def refuses(rule: Rule, row: Raw) -> bool:
        spec = InternVLFineTuneSpec.model_validate(with_recipe(resource(row)["spec"] | {"recipe": None}))
        return any(broken([rule], spec))

    rows = [row for row in TABLE if "rule" in row and "recipe" not in row["spec"]]
    unseen = [rule.check.__name__ for rule in RULES if not any(refuses(rule, row) for row in rows)]
    assert unseen == ["known_recipe"]  # which is judged before the rest


def test_a_run_yaml_written_by_hand_obeys_the_rules_of_its_sections() -> None:
    written = resolve(parse_spec(RIGHT), job="team/run", job_uid="1").to_dict()
    assert RunConfig.model_validate(written).to_dict() == written
    with pytest.raises(ValueError, match="image: minDynamicPatch 7 exceeds maxDynamicPatch 6"):
        RunConfig.model_validate(written | {"image": {"minDynamicPatch": 7, "maxDynamicPatch": 6}})


@pytest.mark.parametrize("output", ["s3://models/new", "s3://models/out"])
def test_they_agree_on_a_changed_output(output: str) -> None:
    (placed,) = TRANSITIONS
    checkpoint = {"checkpoint": {"step": 5, "uri": "s3://models/out/checkpoints/step-00000005"}}
    old, new = {"spec": RIGHT, "status": checkpoint}, {"spec": RIGHT | {"output": output}}
    found = check_spec(new["spec"], InCluster(checkpoint["checkpoint"]["uri"])).violations
    assert [each.message for each in found] == [said for said in [refusal(placed.rule, new, old)] if said]

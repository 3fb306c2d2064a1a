"""The generated CRD: structural, complete, and saying what the models say."""

from collections.abc import Iterator
from typing import Any

import pytest
from internvl_api.crd import build_crd, structural
from internvl_api.spec import RECIPE_SECTIONS, InternVLFineTuneSpec
from jsonschema import Draft4Validator

VERSION = build_crd()["spec"]["versions"][0]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
SPEC = SCHEMA["properties"]["spec"]
MINIMAL: dict[str, Any] = {
    "model": {"source": "s3://models/tiny"},
    "data": {"train": {"pets": {"annotation": "s3://data/pets.jsonl"}}},
    "output": "s3://models/out",
}


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[]")


@pytest.mark.parametrize(("path", "node"), [pytest.param(p, n, id=p or "root") for p, n in nodes(SCHEMA)])
def test_every_node_is_structural(path: str, node: dict[str, Any]) -> None:
    assert "type" in node, f"{path} has no type"
    assert not {"$ref", "anyOf", "title", "const", "prefixItems"} & set(node)
    assert not ("properties" in node and "additionalProperties" in node), "a structural schema allows one of the two"
    assert isinstance(node.get("exclusiveMinimum", True), bool)


@pytest.mark.parametrize("section", RECIPE_SECTIONS)
def test_the_server_fills_in_nothing_a_recipe_may_supply(section: str) -> None:
    found = [
        path for path, node in nodes(SPEC["properties"][section], section) if "default" in node or "required" in node
    ]
    assert found == []


def test_the_server_fills_in_the_rest() -> None:
    assert SPEC["properties"]["runPolicy"]["properties"]["backoffLimit"]["default"] == 3
    assert SPEC["properties"]["data"]["properties"]["badRows"]["default"] == "fail"


def test_columns_and_names_are_those_a_user_types() -> None:
    crd = build_crd()
    assert crd["spec"]["names"]["shortNames"] == ["ivft"]
    assert [c["name"] for c in VERSION["additionalPrinterColumns"] if not c.get("priority")] == [
        "Phase", "Stage", "Progress", "Age",
    ]  # fmt: skip
    assert VERSION["subresources"] == {"status": {}}


@pytest.mark.parametrize(
    ("overrides", "valid"),
    [
        pytest.param({}, True, id="minimal"),
        pytest.param({"workers": 0}, False, id="zero workers"),
        pytest.param({"workers": "two"}, False, id="a word for a number"),
        pytest.param({"method": "qlora"}, False, id="unknown method"),
        pytest.param({"output": "models/out"}, False, id="output without scheme"),
        pytest.param({"model": {"source": "ftp://host/model"}}, False, id="unknown scheme"),
        pytest.param({"training": {"learningRate": 0}}, False, id="learning rate zero"),
        pytest.param({"training": {"learningRate": 4.0e-5, "zeroStage": 3}}, True, id="some training"),
        pytest.param({"training": {"zeroStage": 4}}, False, id="ZeRO 4"),
        pytest.param({"recipe": "Has Spaces"}, False, id="recipe with spaces"),
        pytest.param({"podTemplate": {"tolerations": [{"key": "gpu", "operator": "Exists"}]}}, True, id="pass-through"),
        pytest.param({"data": {"train": {"pets": {}}}}, False, id="dataset without annotation"),
        pytest.param({"secrets": {"objectStorage": "Not_A_Name"}}, False, id="bad secret name"),
    ],
)
def test_the_schema_refuses_what_it_can(overrides: dict[str, Any], valid: bool) -> None:
    # OpenAPI's boolean exclusiveMinimum is JSON schema draft 4's
    assert Draft4Validator(SPEC).is_valid({**MINIMAL, **overrides}) is valid


def test_schema_and_model_have_the_same_fields() -> None:
    assert set(SPEC["properties"]) == {f.alias for f in InternVLFineTuneSpec.model_fields.values()}
    assert structural(InternVLFineTuneSpec)["required"] == SPEC["required"]

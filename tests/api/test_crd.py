"""The generated CRD: structural, complete, and saying what the models say."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from internvl_api.crd import build_crd, structural
from internvl_api.spec import RECIPE_SECTIONS, InternVLFineTuneSpec
from internvl_api.status import InternVLFineTuneStatus

VERSION = build_crd()["spec"]["versions"][0]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
SPEC = SCHEMA["properties"]["spec"]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[]")


def test_every_node_is_structural() -> None:
    for path, node in nodes(SCHEMA):
        is_typed = ("type" in node) != node.get("x-kubernetes-int-or-string", False)
        assert is_typed, f"{path} has no type, or a quantity has one"
        assert not {"$ref", "anyOf", "title", "const", "prefixItems"} & set(node), path
        assert not ("properties" in node and "additionalProperties" in node), f"{path}: a schema allows one of the two"
        assert isinstance(node.get("exclusiveMinimum", True), bool), path


def fields(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every named field; the standard object metadata has its own description everywhere."""
    return ((at, node) for at, node in nodes(schema, path) if not at.endswith("[]") and at not in ("", ".metadata"))


def test_every_field_has_a_description() -> None:
    for path, field in fields(SCHEMA):
        text = field.get("description", "")
        assert re.match(r"[A-Za-z`{]", text), f"{path} has the description {text!r}"
        assert not re.match(r"Default: |Of |Then |With it", text), f"{path} does not say what it is: {text!r}"


@pytest.mark.parametrize("section", RECIPE_SECTIONS)
def test_the_server_fills_in_nothing_a_recipe_may_supply(section: str) -> None:
    found = [
        path for path, node in nodes(SPEC["properties"][section], section) if "default" in node or "required" in node
    ]
    assert found == []


def test_the_server_fills_in_the_rest() -> None:
    assert SPEC["properties"]["runPolicy"]["properties"]["backoffLimit"]["default"] == 3
    assert SPEC["properties"]["data"]["properties"]["badRows"]["default"] == "fail"


def test_a_run_that_no_operator_has_answered_says_so() -> None:
    """kstatus takes an object without observedGeneration and conditions for one that is done."""
    status = SCHEMA["properties"]["status"]
    assert status["default"] == {"observedGeneration": -1}
    assert [path for path, node in nodes(status) if "default" in node] == [""]
    assert InternVLFineTuneStatus.model_validate(status["default"]) == InternVLFineTuneStatus()


def test_columns_and_names_are_those_a_user_types() -> None:
    crd = build_crd()
    assert crd["spec"]["names"]["shortNames"] == ["ivft"]
    assert [c["name"] for c in VERSION["additionalPrinterColumns"] if not c.get("priority")] == [
        "Phase", "Stage", "Progress", "Age",
    ]  # fmt: skip
    assert set(VERSION["subresources"]) == {"status", "scale"}


def test_schema_and_model_have_the_same_fields() -> None:
    assert set(SPEC["properties"]) == {f.alias for f in InternVLFineTuneSpec.model_fields.values()}
    assert structural(InternVLFineTuneSpec).get("required") == SPEC.get("required")


def unbounded(path: str, node: dict[str, Any]) -> Iterator[str]:
    kind, is_quantity = node.get("type"), node.get("x-kubernetes-int-or-string")
    is_open = kind == "object" and not {"properties", "additionalProperties"} & set(node)
    if node.get("x-kubernetes-preserve-unknown-fields") or is_open or not (kind or is_quantity):
        yield f"{path}: free-form"
    if (kind == "string" or is_quantity) and "maxLength" not in node and "enum" not in node:
        yield f"{path}: a string without maxLength"
    if kind == "array":
        if "maxItems" not in node:
            yield f"{path}: a list without maxItems"
        yield from unbounded(f"{path}[]", node["items"])
    if "additionalProperties" in node:
        if "maxProperties" not in node:
            yield f"{path}: a map without maxProperties"
        yield from unbounded(f"{path}.*", node["additionalProperties"])
    for name, part in node.get("properties", {}).items():
        yield from unbounded(f"{path}.{name}", part)


@pytest.mark.parametrize("part", ["spec", "status"])
def test_every_value_is_bounded(part: str) -> None:
    assert list(unbounded(part, SCHEMA["properties"][part])) == []


def test_the_crd_is_small() -> None:
    """A server keeps every CRD in memory several times, and stores at most 1.5 MB."""
    assert len(json.dumps(build_crd())) < 160_000

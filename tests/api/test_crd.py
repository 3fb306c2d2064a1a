"""The generated CRD: structural, complete, and saying what the models say."""

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


@pytest.mark.parametrize(("path", "node"), [pytest.param(p, n, id=p or "root") for p, n in nodes(SCHEMA)])
def test_every_node_is_structural(path: str, node: dict[str, Any]) -> None:
    assert "type" in node, f"{path} has no type"
    assert not {"$ref", "anyOf", "title", "const", "prefixItems"} & set(node)
    assert not ("properties" in node and "additionalProperties" in node), "a structural schema allows one of the two"
    assert isinstance(node.get("exclusiveMinimum", True), bool)


def fields(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every named field; the standard object metadata has its own description everywhere."""
    return ((at, node) for at, node in nodes(schema, path) if not at.endswith("[]") and at not in ("", ".metadata"))


@pytest.mark.parametrize(("path", "field"), [pytest.param(p, f, id=p) for p, f in fields(SCHEMA)])
def test_every_field_has_a_description(path: str, field: dict[str, Any]) -> None:
    description = field.get("description", "")
    assert re.match(r"[A-Za-z`{]", description), f"{path} has the description {description!r}"
    assert not re.match(r"Default: |Of |Then |With it", description), f"{path} does not say what it is: {description!r}"


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
    assert structural(InternVLFineTuneSpec)["required"] == SPEC["required"]


# Parts in Kubernetes' own format, and settings in DeepSpeed's: they have no schema here. Their depth and the length of
# their texts are bounded by internvl_api.validation.limits, their size by the API server's limit of a request.
FREE_FORM = {
    "spec.podTemplate.tolerations[]", "spec.podTemplate.affinity", "spec.podTemplate.resources",
    "spec.podTemplate.imagePullSecrets[]", "spec.podTemplate.volumes[]", "spec.podTemplate.volumeMounts[]",
    "spec.podTemplate.env[]", "spec.training.deepspeed",
    *(f"spec.podTemplate.stageResources.{stage}" for stage in ("preflight", "evaluate", "merge", "publish")),
}  # fmt: skip


def unbounded(path: str, node: dict[str, Any]) -> Iterator[str]:
    kind = node.get("type")
    if node.get("x-kubernetes-preserve-unknown-fields"):
        yield f"{path}: free-form"
    if kind == "string" and "maxLength" not in node and "enum" not in node:
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
    found = set(unbounded(part, SCHEMA["properties"][part]))
    assert found == {f"{path}: free-form" for path in FREE_FORM if path.startswith(part)}

"""Every shipped example is what the API accepts, by the CRD's schema and by the operator's own resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from internvl_api import constants
from internvl_api.resolve import parse_spec, resolve
from ivft_cluster.paths import CHECKOUT

EXAMPLES = sorted((CHECKOUT / "examples").glob("*.yaml"))


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in EXAMPLES])
def test_example_is_accepted(path: Path) -> None:
    example = load(path)
    assert (example["apiVersion"], example["kind"]) == (constants.API_VERSION, constants.KIND)
    crd = load(CHECKOUT / "crds/internvlfinetunes.yaml")
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    jsonschema.validate(example, schema, cls=jsonschema.Draft4Validator)  # what OpenAPI 3.0 schemas are made of
    run = resolve(parse_spec(example["spec"]), job=f"default/{path.stem}", job_uid="uid")
    assert run.output == example["spec"]["output"]


def test_there_are_examples() -> None:
    assert {"quickstart", "quickstart-full"} <= {path.stem for path in EXAMPLES}

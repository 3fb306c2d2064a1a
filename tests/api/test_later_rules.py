"""A CRD that became stricter, and objects from before: what the new one would refuse can still be held and mended."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from api.test_wrong_resources import TABLE, Raw, resource
from internvl_api.constants import GROUP, PLURAL, VERSION
from internvl_api.crd import build_crd
from ivft_cluster.api_server import ApiServer
from ivft_cluster.crds import install_crd
from ivft_cluster.shell import wait_for
from kubernetes import client
from kubernetes.client.exceptions import ApiException

pytestmark = pytest.mark.integration

# What makes a schema strict; what is left are the fields and their types.
STRICT = {
    "x-kubernetes-validations", "x-kubernetes-list-type", "enum", "pattern", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems", "maxProperties", "required",
}  # fmt: skip
NAMESPACE = "default"


def loosened(schema: Raw) -> Raw:
    """A schema that asks only for types."""
    return {
        key: {name: loosened(each) for name, each in value.items()}
        if key == "properties"
        else loosened(value)
        if key in ("items", "additionalProperties")
        else value
        for key, value in schema.items()
        if key not in STRICT
    }


class Objects:
    """Those of a server."""

    def __init__(self, server: ApiServer) -> None:
        self._jobs = client.CustomObjectsApi(server.api)

    def create(self, raw: Raw, **options: Any) -> bool:
        """True when the server accepts the object."""
        try:
            self._jobs.create_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL, raw, **options)
        except ApiException as error:
            if error.status != 422:
                raise
            return False
        return True

    def patch(self, name: str, change: Raw, part: str = "") -> str:
        """The server's refusal; empty when the patch is applied."""
        patch: Any = getattr(self._jobs, f"patch_namespaced_custom_object{part}")
        try:
            patch(GROUP, VERSION, NAMESPACE, PLURAL, name, change)
        except ApiException as error:
            return str(json.loads(error.body)["message"])
        return ""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Objects, dict[str, Raw]]]:
    """Objects by name that today's CRD refuses to create, on a server that has it now."""
    today = build_crd()
    loose = copy.deepcopy(today)
    schema = loose["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["properties"]["spec"] = loosened(schema["properties"]["spec"])
    del schema["x-kubernetes-validations"]
    with ApiServer(tmp_path_factory.mktemp("later-rules")) as server:
        objects = Objects(server)
        install_crd(server, loose)
        made = {}
        for number, row in enumerate(row for row in TABLE if {"rule", "server"} & set(row) and row["spec"] is not None):
            raw = resource(row | {"metadata": {"name": f"old-{number}"}})
            if objects.create(raw):
                made[raw["metadata"]["name"]] = row | {"sent": raw}
        install_crd(server, today)
        new = {"metadata": {"name": "new"}}
        wait_for("the schema is today's", lambda: not objects.create(resource({"spec": {"workers": 0}} | new)))
        refused = {
            name: row for name, row in made.items()
            if not objects.create(row["sent"] | {"metadata": new["metadata"]}, dry_run="All")
        }  # fmt: skip
        yield objects, refused


def test_an_object_that_a_later_rule_refuses_is_still_looked_after(old: tuple[Objects, dict[str, Raw]]) -> None:
    objects, refused = old
    print(f"{len(refused)} objects that today's CRD refuses")
    assert len(refused) >= 60
    assert {row["rule"] for row in refused.values() if "rule" in row} == {row["rule"] for row in TABLE if "rule" in row}
    for name, row in refused.items():
        told = {
            "status": objects.patch(name, {"status": {"phase": "Stalled"}}, "_status"),
            "label": objects.patch(name, {"metadata": {"labels": {"team": "a"}}}),
            "annotation": objects.patch(name, {"metadata": {"annotations": {"note": "b"}}}),
            "suspend": objects.patch(name, {"spec": {"runPolicy": {"suspend": True}}}),
        }
        assert not any(told.values()), f"{row['case']}: {told}"


def test_it_can_be_mended_but_not_made_wrong_in_another_way(old: tuple[Objects, dict[str, Raw]]) -> None:
    objects, refused = old
    name = next(name for name, row in refused.items() if row["case"] == "tile bounds crossed")
    assert "spec.image: Invalid value: minDynamicPatch 8" in objects.patch(
        name, {"spec": {"image": {"minDynamicPatch": 8}}}
    ).replace('"object": ', "")
    assert "spec.workers: Invalid value: 0" in objects.patch(name, {"spec": {"workers": 0}})
    assert objects.patch(name, {"spec": {"image": {"minDynamicPatch": 6}}}) == ""

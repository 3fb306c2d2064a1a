"""What is sent, whatever users write and however old the CRD is."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import yaml
from controller.builders import Raw, custom_resource
from hypothesis import given
from hypothesis import strategies as st
from internvl_api.status import InternVLFineTuneStatus, StageStatus, Workers
from internvl_operator.core.run import read_run
from internvl_operator.kube.applier import Applier
from internvl_operator.kube.cache import RunCache
from internvl_operator.kube.client import Api, ApiError, encode


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_is_applied_is_yaml_that_says_the_same(text: str) -> None:
    assert yaml.safe_load(encode({"data": {"run.yaml": text}})) == {"data": {"run.yaml": text}}


class OldServer:
    """Refuses a status with a field that its CRD has not, as server-side apply does; `lacks` are the words it uses."""

    def __init__(self, *lacks: str) -> None:
        self.lacks, self.asked = list(lacks), list[Raw]()

    def apply_status(self, obj: Raw) -> Raw:
        self.asked.append(copy.deepcopy(obj["status"]))
        for words in self.lacks:
            top, _, nested = words.partition("[")
            found = obj["status"].get(top.removeprefix("."), {})
            if found and (not nested or any("attempt" in entry for entry in found)):
                text = f"failed to create typed patch object: .status{words}: field not declared in schema"
                raise ApiError(500, "", text)
        return custom_resource(status=obj["status"])


def test_a_field_that_an_older_crd_has_not_is_left_out() -> None:
    server = OldServer(".workers", '.stages[name="train"].attempt')
    status = InternVLFineTuneStatus(phase="Running", stages=[StageStatus(name="train", attempt=2)])
    with ThreadPoolExecutor(1) as executor:
        applier = Applier(cast(Api, server), RunCache(), {}, executor)
        assert applier.write_status(read_run(custom_resource()), status)
        written = server.asked[-1]
        assert written["phase"] == "Running"
        assert "workers" not in written
        assert written["stages"] == [{"name": "train", "state": "Pending", "artifacts": {}}]
        assert len(server.asked) == 3, "one refusal for each field"
        same = status.model_copy(update={"workers": Workers(active=7)})
        assert not applier.write_status(read_run(custom_resource(status=written)), same), "nothing that can be written"
        assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("message", "path"),
    [
        pytest.param("failed: .status.workers: field not declared in schema", ("status", "workers"), id="a-field"),
        pytest.param(
            'failed: .status.conditions[type="Ready"].observedGeneration: field not declared in schema',
            ("status", "conditions", "observedGeneration"),
            id="of-an-entry",
        ),
        pytest.param("the object has been modified", (), id="anything-else"),
    ],
)
def test_the_field_that_is_not_declared(message: str, path: tuple[Any, ...]) -> None:
    assert ApiError(500, "", message).undeclared == path

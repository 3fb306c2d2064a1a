"""`kubectl ivft diff`: only what differs, with recipes and defaults filled in, in the order of the spec."""

from typing import Any

import pytest
from controller.builders import custom_resource
from internvl_operator.kubectl_ivft.client import UserError
from internvl_operator.kubectl_ivft.diff import Difference, differences


def fields(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    return [each.field for each in differences(custom_resource("a", **first), custom_resource("b", **second))]


def test_equal_configurations_have_no_difference_however_they_are_written() -> None:
    assert fields({}, {}) == []
    assert fields({}, {"training": {"precision": "bf16"}, "merge": {}}) == []  # the default, written out


def test_a_recipe_shows_as_the_settings_that_it_changes_in_the_order_of_the_spec() -> None:
    model = {"name": "InternVL2-2B"}
    lora = {"model": model, "recipe": "internvl2-2b-lora-coco", "output": "s3://out/b"}
    found = fields({"model": model, "method": "lora"}, lora)
    assert found[0] == "recipe"
    assert {"lora.languageRank", "training.learningRate", "training.freeze.language", "output"} <= set(found)
    assert found.index("lora.languageRank") < found.index("training.learningRate") < found.index("output")
    assert "data.train.photos.annotation" not in found


def test_a_value_that_only_one_run_has() -> None:
    env = {"podTemplate": {"env": [{"name": "B", "value": "2"}, {"name": "A", "value": "1"}]}}
    other = {"podTemplate": {"env": [{"name": "A", "value": "1"}]}}
    (found,) = differences(custom_resource("a", **env), custom_resource("b", **other))
    assert found == Difference("podTemplate.env.B", '{"name": "B", "value": "2"}', "-")


def test_a_micro_batch_that_the_operator_made_smaller_is_shown() -> None:
    raw = custom_resource("a", status={"microBatchSize": 2}, training={"microBatchSize": 4})
    assert differences(raw, custom_resource("b", training={"microBatchSize": 4})) == [
        Difference("training.microBatchSize", "2", "4")
    ]


def test_a_key_in_an_address_is_not_shown() -> None:
    data = {"train": {"photos": {"annotation": "https://data.example.org/t.jsonl?signature=secret"}}}
    (found,) = differences(custom_resource("a", data=data), custom_resource("b"))
    assert "secret" not in found.first


def test_an_invalid_spec_is_named() -> None:
    with pytest.raises(UserError, match=r"run 'b' is invalid: spec\.workers"):
        fields({}, {"workers": 0})

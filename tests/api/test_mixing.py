"""Settings of mixtures that contradict each other."""

from __future__ import annotations

from typing import Any

import pytest
from internvl_api.validation.check import check_spec


def dataset(weight: float | None) -> dict[str, Any]:
    return {"annotation": "s3://data/a.jsonl"} | ({} if weight is None else {"weight": weight})


@pytest.mark.parametrize(
    ("data", "field", "message"),
    [
        pytest.param({"train": {"a": dataset(1), "b": dataset(2)}}, None, None, id="weights"),
        pytest.param({"train": {"a": dataset(None)}, "mixingTemperature": 2}, None, None, id="temperature"),
        pytest.param(
            {"train": {"a": dataset(1), "b": dataset(None)}},
            "spec.data.train.b.weight",
            "found none, and train.a has one; give every dataset a weight, or none",
            id="a weight is missing",
        ),
        pytest.param(
            {"train": {"a": dataset(1)}, "mixingTemperature": 2},
            "spec.data.mixingTemperature",
            "found 2, and train.a has a weight; remove one of them",
            id="both",
        ),
        pytest.param(
            {"train": {"a": dataset(1)}, "meta": "s3://data/meta.json"},
            "spec.data.meta",
            "train.a has a weight, and datasets of a meta JSON have none; list them in train",
            id="a meta JSON",
        ),
    ],
)
def test_mixtures(data: dict[str, Any], field: str | None, message: str | None) -> None:
    checked = check_spec({"model": {"source": "s3://models/a"}, "output": "s3://out/a", "data": data})
    found = [(each.field, each.message) for each in checked.violations]
    assert found == ([] if field is None else [(field, message)])

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
        pytest.param({"train": {"a": dataset(2)}}, None, None, id="one weight of one dataset"),
        pytest.param({"train": {"a": dataset(None), "b": dataset(None)}, "mixingTemperature": 2}, None, None, id="hot"),
        pytest.param(
            {"train": {"a": dataset(None)}, "meta": "s3://data/m.json", "mixingTemperature": 2}, None, None, id="meta"
        ),
        pytest.param(
            {"train": {"a": dataset(1), "b": dataset(None)}},
            "spec.data.train",
            "some datasets have a weight and others have none; give every dataset a weight, or none",
            id="a weight is missing",
        ),
        pytest.param(
            {"train": {"a": dataset(1), "b": dataset(2)}, "mixingTemperature": 2},
            "spec.data.mixingTemperature",
            "datasets of train have weights, which mixingTemperature would replace; remove it or the weights",
            id="both",
        ),
        pytest.param(
            {"train": {"a": dataset(1)}, "meta": "s3://data/meta.json"},
            "spec.data.meta",
            "datasets of train have weights, and those of a meta JSON have none; list them in train, or remove the "
            "weights",
            id="weights and a meta JSON",
        ),
        pytest.param(
            {"train": {"a": dataset(None)}, "mixingTemperature": 2},
            "spec.data.mixingTemperature",
            "mixingTemperature has no effect on a single dataset; remove it, or add datasets",
            id="a temperature for one dataset",
        ),
        pytest.param(
            {"train": {"a": dataset(None)}, "validation": {"b": dataset(1)}},
            "spec.data.validation.b.weight",
            "weight has no effect on a held-out dataset, of which every row is measured; remove it",
            id="a weight of a held-out dataset",
        ),
    ],
)
def test_mixtures(data: dict[str, Any], field: str | None, message: str | None) -> None:
    checked = check_spec({"model": {"source": "s3://models/a"}, "output": "s3://out/a", "data": data})
    found = [(each.field, each.message) for each in checked.violations]
    assert found == ([] if field is None else [(field, message)])

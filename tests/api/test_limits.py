"""Limits that hold for every spec, before anything else looks at it."""

from typing import Any

import pytest
from internvl_api.validation.check import check_spec
from internvl_api.validation.limits import MAX_DEPTH, MAX_TEXT, MAX_VALUES, over_limits


def nested(levels: int, value: Any = 1) -> Any:
    for _ in range(levels):
        value = {"a": value}
    return value


def test_a_value_at_the_limits_is_accepted() -> None:
    assert over_limits({"x": "y" * MAX_TEXT, "z" * MAX_TEXT: 1}) is None
    assert over_limits(nested(MAX_DEPTH - 1)) is None


@pytest.mark.parametrize(
    ("raw", "field", "message"),
    [
        ({"output": "x" * (MAX_TEXT + 1)}, "spec.output", "found a text of 32,769 characters, expected at most 32,768"),
        ({"a": [1, {"b": "x" * 40_000}]}, "spec.a[1].b", "found a text of 40,000 characters, expected at most 32,768"),
        ({"k" * 40_000: 1}, "spec", "found a text of 40,000 characters, expected at most 32,768"),
        (nested(MAX_DEPTH), "spec.a.a.a.a…", "nested deeper than 32 levels; remove the levels that have no use"),
        (nested(9000), "spec.a.a.a.a…", "nested deeper than 32 levels; remove the levels that have no use"),
        ([[[[[]]]]] * 2, None, None),
    ],
)
def test_a_value_beyond_the_limits_is_named(raw: Any, field: str | None, message: str | None) -> None:
    found = over_limits(raw)
    assert (found and found.field, found and found.message) == (field, message)


def test_the_number_of_values_is_limited() -> None:
    assert over_limits({"a": [1] * (MAX_VALUES - 2)}) is None
    found = over_limits({"a": [1] * (MAX_VALUES - 1)})
    assert found == ("spec", "found more than 50,000 values in all; split the run", "InvalidSpec")


def test_of_many_mistakes_the_first_hundred_are_named() -> None:
    assert len(check_spec({f"x{number}": 1 for number in range(1000)}).violations) == 100


@pytest.mark.parametrize("field", ["output", "recipe", "method"])
def test_every_check_works_on_small_values_only(field: str) -> None:
    (violation,) = check_spec({"data": {}, "output": "s3://out/run", field: "/" * 1_000_000}).violations
    assert violation.field == f"spec.{field}"


def test_a_message_counts_the_entries_of_a_map() -> None:
    labels = {f"label-{number}": "x" for number in range(101)}
    found = {each.field: each.message for each in check_spec({"podTemplate": {"labels": labels}}).violations}
    assert found["spec.podTemplate.labels"] == "found 101 entries, expected at most 100"

"""A run that will not fit its GPUs: said in a condition and an event, and started all the same."""

from typing import Any

import pytest
from controller.builders import CONFIG, NOW, a_run, at, custom_resource, text
from internvl_api.quantity import GIB
from internvl_api.status import Condition
from internvl_operator.core.conditions import with_estimates
from internvl_operator.core.observe import Observed
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.plan import Plan
from internvl_operator.core.reconcile import reconcile
from internvl_operator.core.run import read_run

BIG = {"model": {"name": "InternVL2-8B"}, "workers": 1, "gpusPerWorker": 1}


def found(gpu_memory: int | None, **changes: Any) -> Condition | None:
    return next(iter(with_estimates([], a_run(**changes), gpu_memory, NOW)), None)


@pytest.mark.parametrize(
    ("gib", "changes", "status", "reason", "opening"),
    [
        pytest.param(24, BIG, "False", "DoesNotFit", "Does not fit: ", id="eight billion on one small GPU"),
        pytest.param(
            80, BIG | {"model": {"name": "InternVL2-1B"}, "method": "lora"}, "True", "Fits", "Fits: ", id="small"
        ),
        pytest.param(
            27,
            BIG | {"model": {"name": "InternVL2-8B"}, "method": "lora", "training": {"maxSeqLength": 32768}},
            "True",
            "Tight",
            "Fits typical rows (",
            id="only typical rows",
        ),
    ],
)
def test_the_verdict(gib: int, changes: dict[str, Any], status: str, reason: str, opening: str) -> None:
    condition = found(gib * GIB, **changes)
    assert condition is not None
    assert (condition.type, condition.status, condition.reason) == ("MemoryEstimate", status, reason)
    assert condition.message.startswith(opening)


@pytest.mark.parametrize(
    ("gpu_memory", "changes"),
    [
        pytest.param(None, BIG, id="memory unknown"),
        pytest.param(GIB, BIG | {"gpusPerWorker": 0}, id="on CPUs"),
        pytest.param(GIB, BIG | {"model": {"source": "s3://models/own"}}, id="a model of the user's"),
        pytest.param(GIB, BIG | {"model": {"name": "InternVL9"}}, id="a spec that cannot be run"),
    ],
)
def test_where_nothing_can_be_said_nothing_is(gpu_memory: int | None, changes: dict[str, Any]) -> None:
    assert found(gpu_memory, **changes) is None


def advance(gpu_memory: int | None, status: dict[str, Any] | None = None, seconds: float = 0) -> Plan:
    raw = custom_resource(status=status, **BIG)
    return reconcile(read_run(raw), Observed(), at(seconds), OperatorConfig(gpu_memory=gpu_memory))


def test_a_run_that_does_not_fit_is_warned_once_and_starts() -> None:
    plan = advance(24 * GIB)
    assert plan.status is not None
    assert [child["kind"] for child in plan.apply] == [
        child["kind"] for child in reconcile(a_run(**BIG), Observed(), NOW, CONFIG).apply
    ]
    assert plan.apply
    assert plan.status.phase != "Stalled"
    assert plan.status.conditions[-1].type == "MemoryEstimate"
    assert [event.kind for event in plan.events if event.reason == "DoesNotFit"] == ["Warning"]

    again = advance(24 * GIB, plan.status.to_dict(), seconds=60)
    assert again.status is not None
    assert again.status.conditions[-1] == plan.status.conditions[-1]
    assert again.status.conditions[-1].last_transition_time == text(NOW)
    assert [event for event in again.events if event.reason == "DoesNotFit"] == []


def test_a_setting_taken_back_takes_the_condition_along() -> None:
    warned = advance(24 * GIB)
    assert warned.status is not None
    plain = advance(None, warned.status.to_dict())
    assert plain.status is not None
    assert "MemoryEstimate" not in {condition.type for condition in plain.status.conditions}

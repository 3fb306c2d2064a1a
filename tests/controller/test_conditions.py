"""Conditions as kstatus, Argo CD and `kubectl wait` read them."""

import pytest
from controller.builders import NOW, at, text
from internvl_api.status import Condition, Phase
from internvl_operator.core.conditions import is_true, set_condition, summarise

TYPES = ["Ready", "Reconciling", "Stalled", "Suspended", "Complete", "Failed"]


@pytest.mark.parametrize(
    ("phase", "true"),
    [
        ("Pending", {"Reconciling"}),
        ("Running", {"Reconciling"}),
        ("Suspended", {"Suspended"}),
        ("Stalled", {"Stalled"}),
        ("Succeeded", {"Ready", "Complete"}),
        ("Failed", {"Stalled", "Failed"}),
    ],
)
def test_conditions_of_a_phase(phase: Phase, true: set[str]) -> None:
    found = summarise([], phase, "SomeReason", "some words", 3, NOW)
    assert [condition.type for condition in found] == TYPES
    assert {condition.type for condition in found if condition.status == "True"} == true
    for condition in found:
        assert condition.observed_generation == 3
        assert condition.message
        speaks = condition.type in true or condition.type == "Ready"
        assert (condition.reason == "SomeReason") == speaks


def test_the_time_of_a_transition_is_kept_until_the_status_changes() -> None:
    first = summarise([], "Running", "TrainRunning", "2 of 2", 1, NOW)
    later = summarise(first, "Running", "PublishRunning", "1 of 1", 1, at(60))
    assert {condition.last_transition_time for condition in later} == {text(NOW)}
    done = summarise(later, "Succeeded", "Published", "at s3://", 1, at(120))
    changed = {c.type for c in done if c.last_transition_time == text(at(120))}
    assert changed == {"Ready", "Reconciling", "Complete"}


def test_the_same_summary_twice_is_the_same_status() -> None:
    first = summarise([], "Stalled", "BadRow", "line 3", 1, NOW)
    assert summarise(first, "Stalled", "BadRow", "line 3", 1, at(60)) == first


def test_a_very_long_message_is_cut() -> None:
    (ready, *_) = summarise([], "Stalled", "BadRow", "x" * 100_000, 1, NOW)
    assert len(ready.message) == 4096


def test_set_condition_replaces_only_its_type() -> None:
    def condition(kind: str, status: str, moment: str) -> Condition:
        return Condition.model_validate({"type": kind, "status": status, "reason": "R", "lastTransitionTime": moment})

    old = [condition("Ready", "False", "then"), condition("Stalled", "False", "then")]
    new = set_condition(old, condition("Ready", "True", "now"))
    assert is_true(new, "Ready")
    assert not is_true(new, "Stalled")
    assert {c.type: c.last_transition_time for c in new} == {"Ready": "now", "Stalled": "then"}

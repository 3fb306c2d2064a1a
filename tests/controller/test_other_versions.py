"""Statuses that another version of the operator wrote: what is known counts, and nothing that runs is restarted."""

import pytest
from controller.builders import NOW, Raw, custom_resource, text
from controller.simulator import World
from controller.test_stages import EVERYTHING, STAGES, _pass, _reach
from internvl_api.constants import KIND
from internvl_operator.core.run import read_run, read_status


def condition(kind: str, **fields: str) -> Raw:
    known = {"type": kind, "status": "True", "reason": "Published", "lastTransitionTime": text(NOW)}
    return {**known, **fields}


def test_a_stage_that_is_new_in_this_version_waits_for_the_one_that_trains() -> None:
    world = World(**EVERYTHING)
    _reach(world, "train")
    world.server.remove("Pod", "run-baseline-score-0")

    def by_an_earlier_version(raw: Raw) -> None:
        raw["status"]["stages"] = [entry for entry in raw["status"]["stages"] if entry["name"] != "baseline-score"]

    world.server.change(KIND, "run", by_an_earlier_version)
    world.operator.settle()
    assert world.status["stage"] == "train"
    assert not any("deletionTimestamp" in world.server.pods[name]["metadata"] for name in world.pods("train"))
    for stage in ("train", "baseline-score", "evaluate", "score", "merge", "publish"):
        assert world.status["stage"] == stage
        _pass(world, stage)
    assert world.status["phase"] == "Succeeded"
    assert [entry["name"] for entry in world.status["stages"]] == [*STAGES]


def test_a_complete_run_stays_complete_beside_a_condition_of_a_later_version() -> None:
    status = {"phase": "Succeeded", "conditions": [condition("Later"), condition("Complete")]}
    run = read_run(custom_resource(status=status))
    assert [each.type for each in run.status.conditions] == ["Complete"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        pytest.param({"attempt": "x", "phase": "Running"}, {"phase": "Running"}, id="a value"),
        pytest.param(
            {"restarts": {"user": "x", "infrastructure": 2}},
            {"restarts": {"user": 0, "infrastructure": 2}},
            id="a part of a section",
        ),
        pytest.param({"progress": {"stage": "later", "step": 4}}, {"progress": {"step": 4}}, id="an optional word"),
        pytest.param({"elastic": {"workers": "x"}}, {}, id="a section without a value that it needs"),
        pytest.param({"nodeFailures": {"x" * 300: 1, "gpu-1": 2}}, {"nodeFailures": {"gpu-1": 2}}, id="a key"),
        pytest.param(
            {"conditions": [{}, condition("Ready"), {"type": "Later"}, condition("Failed", status="Maybe")]},
            {"conditions": [condition("Ready", message="")]},
            id="entries before and after a good one",
        ),
        pytest.param(
            {"stages": [{"name": "later"}, {"name": "train", "attempts": [{"number": 1}, "x"], "attempt": 3}]},
            {"stages": [{"name": "train", "attempt": 3, "attempts": []}]},
            id="a list in a list",
        ),
        pytest.param({"conditions": {"a": 1}, "stages": 5}, {}, id="no lists"),
    ],
)
def test_a_status_is_read_without_what_is_strange(raw: Raw, expected: Raw) -> None:
    found, usual = read_status(raw).to_dict(), read_status({}).to_dict()
    named = {key: _shown(found[key], expected.get(key)) for key in found if found[key] != usual.get(key)}
    assert named == expected


def _shown(found: object, expected: object) -> object:
    """The parts of a status that the expectation names."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return {key: _shown(value, expected[key]) for key, value in found.items() if key in expected}
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        return [_shown(one, other) for one, other in zip(found, expected, strict=True)]
    return found

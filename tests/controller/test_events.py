"""Kubernetes Events and metrics: told once when something changes, silent otherwise."""

import contextlib
from typing import Any

import pytest
from controller.builders import Raw, a_run, custom_resource
from controller.fake_server import Server
from controller.simulator import Operator
from internvl_api.status import InternVLFineTuneStatus
from internvl_operator.core.events import events_between
from internvl_operator.core.plan import Event
from internvl_operator.kube.event_recorder import EventRecorder
from internvl_operator.metrics import RunCollector


def status(**fields: Any) -> InternVLFineTuneStatus:
    return InternVLFineTuneStatus.model_validate(fields)


def condition(kind: str, value: str, reason: str) -> Raw:
    return {"type": kind, "status": value, "reason": reason, "message": "words", "lastTransitionTime": "t"}


TRAIN = {"name": "train", "state": "Running", "attempt": 1}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        pytest.param({}, {"stages": [TRAIN]}, ["Normal StageStarted"], id="a-stage-starts"),
        pytest.param({"stages": [TRAIN]}, {"stages": [TRAIN]}, [], id="nothing-changes"),
        pytest.param(
            {"stages": [TRAIN]},
            {"stages": [TRAIN | {"message": "boom"}]},
            ["Warning AttemptEnded"],
            id="an-attempt-ends",
        ),
        pytest.param(
            {"stages": [TRAIN | {"message": "boom"}]},
            {"stages": [TRAIN | {"message": "boom", "attempt": 2}]},
            ["Normal StageStarted"],
            id="and-is-made-again",
        ),
        pytest.param(
            {"stages": [TRAIN]},
            {"stages": [TRAIN | {"state": "Succeeded"}]},
            ["Normal StageSucceeded"],
            id="a-stage-is-done",
        ),
        pytest.param(
            {"stages": [TRAIN]},
            {"stages": [TRAIN | {"state": "Succeeded", "message": "LossRises: from 1 to 20"}]},
            ["Normal StageSucceeded"],
            id="a-stage-is-done-with-a-warning",
        ),
        pytest.param(
            {"progress": {"step": 1}},
            {"progress": {"step": 40, "warning": "LossRises: from 1 to 20"}},
            ["Warning LossRises"],
            id="training-warns",
        ),
        pytest.param(
            {"progress": {"step": 40, "warning": "LossRises: from 1 to 20"}},
            {"progress": {"step": 41, "warning": "LossRises: from 1 to 20"}},
            [],
            id="training-warned-before",
        ),
        pytest.param({}, {"progress": {"warning": "no reason: x"}}, [], id="a-warning-without-a-reason"),
        pytest.param({}, {"conditions": [condition("Stalled", "True", "BadRow")]}, ["Warning BadRow"], id="stalled"),
        pytest.param(
            {"conditions": [condition("Stalled", "True", "BadRow")]},
            {"conditions": [condition("Stalled", "True", "BadRow")]},
            [],
            id="still-stalled",
        ),
        pytest.param(
            {"conditions": [condition("Stalled", "True", "BadRow")]},
            {"conditions": [condition("Stalled", "True", "SecretMissing")]},
            ["Warning SecretMissing"],
            id="stalled-for-another-reason",
        ),
        pytest.param(
            {"conditions": [condition("Stalled", "True", "BadRow")]},
            {"conditions": [condition("Stalled", "False", "NotStalled")]},
            [],
            id="not-stalled-any-more",
        ),
        pytest.param(
            {}, {"conditions": [condition("Complete", "True", "Published")]}, ["Normal Published"], id="complete"
        ),
        pytest.param({"progress": {"step": 1}}, {"progress": {"step": 2}}, [], id="progress-is-no-event"),
    ],
)
def test_events(old: Raw, new: Raw, told: list[str]) -> None:
    assert [f"{event.kind} {event.reason}" for event in events_between(status(**old), status(**new))] == told


def test_the_end_of_an_attempt_is_told_by_the_word_that_the_runbook_has() -> None:
    ended = TRAIN | {"reason": "Drained", "message": "worker 1 was drained"}
    (event,) = events_between(status(stages=[TRAIN]), status(stages=[ended]))
    assert event.message == "train: Drained: worker 1 was drained"


def test_events_of_one_second_are_listed_in_the_order_they_happened() -> None:
    made: list[Raw] = []

    class Server:
        def create(self, obj: Raw) -> Raw:
            made.append(obj)
            if len(made) == 3:
                raise SystemExit  # ends the thread
            return obj

    sink = EventRecorder(Server())  # type: ignore[arg-type]
    reasons = ["StageStarted", "StageSucceeded", "Another"]
    for reason in reasons:
        sink.send(a_run("x" * 253), Event("Normal", reason, "words"), "2026-01-31T12:00:00Z")
    with contextlib.suppress(SystemExit):
        sink._run()
    assert [event["reason"] for event in sorted(made, key=lambda event: event["metadata"]["name"])] == reasons
    assert max(len(event["metadata"]["name"]) for event in made) <= 253


def test_a_settled_run_has_no_events() -> None:
    server = Server()
    server.create(custom_resource())
    operator = Operator(server)
    operator.settle()
    sent = len(server.events)
    assert sent
    operator.run_pass()
    assert len(server.events) == sent


def test_metrics_speak_only_of_runs_that_exist() -> None:
    runs = [
        ("team", "a", status(phase="Running", attempt=2, progress={"step": 5, "totalSteps": 10, "loss": 1.5})),
        ("team", "b", status(phase="Running")),
        ("team", "c", status()),
    ]
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in RunCollector(lambda: runs).collect()
        for sample in family.samples
    }
    assert samples[("internvl_operator_jobs", "Running")] == 2
    assert samples[("internvl_operator_jobs", "Pending")] == 1
    assert samples[("internvl_job_step", "team", "a")] == 5
    assert samples[("internvl_job_total_steps", "team", "a")] == 10
    assert samples[("internvl_job_loss", "team", "a")] == 1.5
    assert ("internvl_job_step", "team", "b") not in samples
    runs.clear()
    assert not [sample for family in RunCollector(lambda: runs).collect() for sample in family.samples]

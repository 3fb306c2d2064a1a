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
from internvl_operator.kube.client import ApiError
from internvl_operator.kube.event_recorder import EventRecorder, _build
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
        pytest.param(
            {"progress": {"step": 8}},
            {"progress": {"step": 8, "endedEarly": "ended after step 8: …"}},
            ["Normal EarlyStopped"],
            id="training-ends-early",
        ),
        pytest.param(
            {"progress": {"step": 8, "endedEarly": "ended after step 8: …"}},
            {"progress": {"stage": "publish", "step": 8, "endedEarly": "ended after step 8: …"}},
            [],
            id="it-ended-before",
        ),
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


class Recorder:
    """An API server that keeps events, or refuses to change them with `status`."""

    def __init__(self, status: int = 0) -> None:
        self.events: dict[str, Raw] = {}
        self.status = status

    def create(self, obj: Raw) -> Raw:
        self.events[obj["metadata"]["name"]] = obj
        return obj

    def patch(self, kind: str, namespace: str, name: str, patch: Raw) -> Raw:
        if self.status:
            raise ApiError(self.status, "Refused", "words")
        self.events[name] |= patch
        return self.events[name]

    def take(self, *messages: str, reason: str = "BadRow", name: str = "run") -> None:
        """Send them all, from a new process."""
        sink = EventRecorder(self)  # type: ignore[arg-type]
        for second, message in enumerate(messages):
            sink.send(a_run(name), Event("Warning", reason, message), f"2026-01-31T12:00:0{second}Z")
        sink._queue.put(None)
        sink._run()

    @property
    def told(self) -> list[tuple[str, int]]:
        return [(event["message"], event["count"]) for event in self.events.values()]


def test_an_unexpected_error_costs_one_event_and_not_the_thread() -> None:
    class Failing(Recorder):
        def create(self, obj: Raw) -> Raw:
            if obj["message"] == "first":
                raise KeyError("words")
            return super().create(obj)

    server = Failing()
    server.take("first", "a lone half of a pair: \ud83d")
    assert server.told == [("a lone half of a pair: ", 1)]


def test_a_repeated_event_is_one_line_with_a_count_and_the_newest_words() -> None:
    server = Recorder()
    server.take("starts again at 12:00:10", "starts again at 12:00:20", "starts again at 12:00:40", "no row")
    assert server.told == [("starts again at 12:00:40", 3), ("no row", 1)]
    first = next(iter(server.events.values()))
    assert (first["firstTimestamp"], first["lastTimestamp"]) == ("2026-01-31T12:00:00Z", "2026-01-31T12:00:02Z")


@pytest.mark.parametrize("status", [404, 403])
def test_an_event_that_cannot_be_raised_is_sent_again(status: int) -> None:
    server = Recorder(status)
    server.take("words", "words")
    assert server.told == [("words", 1), ("words", 1)]


def test_events_of_other_reasons_are_not_counted_together() -> None:
    server = Recorder()
    server.take("words")
    server.take("words", reason="AnotherReason")
    assert server.told == [("words", 1), ("words", 1)]


def test_what_is_remembered_of_events_is_bounded() -> None:
    sink = EventRecorder(Recorder())  # type: ignore[arg-type]
    for word in range(2100):
        event = Event("Normal", "Reason", "x" * (word % 1000) + "y" * (word // 1000))
        sink._deliver(_build(a_run(), event, "2026-01-31T12:00:00Z", word))
    assert len(sink._sent) == 2000


def test_the_end_of_an_attempt_and_the_stall_that_follows_are_one_event() -> None:
    ended = TRAIN | {"reason": "BadRow", "message": "line 7"}
    stalled = condition("Stalled", "True", "BadRow")
    found = events_between(status(stages=[TRAIN]), status(stages=[ended], conditions=[stalled]))
    assert [event.reason for event in found] == ["BadRow"]
    other = condition("Stalled", "True", "SecretMissing")
    found = events_between(status(stages=[TRAIN]), status(stages=[ended], conditions=[other]))
    assert [event.reason for event in found] == ["AttemptEnded", "SecretMissing"]


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

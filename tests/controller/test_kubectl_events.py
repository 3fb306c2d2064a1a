"""`kubectl ivft events`: which events belong to a run, and which of them are one line."""

from typing import Any

import pytest
from controller.builders import UID, Raw, at, custom_resource, text
from internvl_operator.kubectl_ivft.client import Runs
from internvl_operator.kubectl_ivft.events import causes
from kubernetes import client

NO_ROOM = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."


def event(kind: str, name: str, message: str = "words", *, seen: float = 1, **fields: Any) -> Raw:
    about = {"kind": kind, "name": name, "uid": fields.pop("uid", "any")}
    times = {"firstTimestamp": text(at(seen)), "lastTimestamp": text(at(seen))}
    base = {"metadata": {"creationTimestamp": text(at(seen))}, "type": "Normal", "reason": "Reason", "count": 1}
    return base | times | {"involvedObject": about, "message": message} | fields


@pytest.mark.parametrize(
    ("of", "belongs"),
    [
        pytest.param(event("InternVLFineTune", "run", uid=UID), True, id="the-run"),
        pytest.param(event("InternVLFineTune", "run", uid="another"), False, id="an-earlier-run-of-the-name"),
        pytest.param(event("Pod", "run-train-1"), True, id="a-worker"),
        pytest.param(event("Pod", "run-train-1", seen=-60), False, id="a-worker-of-an-earlier-run"),
        pytest.param(event("Pod", "run-baseline-evaluate-0"), True, id="a-stage-with-a-dash"),
        pytest.param(event("Pod", "run-train-0-other"), False, id="a-longer-name"),
        pytest.param(event("Pod", "other-run-train-0"), False, id="another-run"),
        pytest.param(event("ConfigMap", "ivft-run"), True, id="a-child-of-all-stages"),
        pytest.param(event("Workload", "run-train-2"), True, id="the-attempt-in-Kueue"),
        pytest.param({"metadata": {}}, False, id="about-nothing"),
    ],
)
def test_which_events_belong_to_a_run(of: Raw, belongs: bool) -> None:
    assert bool(causes(custom_resource(), [of])) == belongs


def test_equal_events_of_all_workers_are_one_line_in_the_order_of_time() -> None:
    workers = [
        event("Pod", f"run-train-{rank}", NO_ROOM, seen=10 + rank, count=7, reason="FailedScheduling", type="Warning")
        for rank in range(3)
    ]
    again = event("Pod", "run-train-0", NO_ROOM, seen=40, reason="FailedScheduling", type="Warning")
    started = event("InternVLFineTune", "run", "train: attempt 1 started", seen=5, uid=UID)
    first, second = causes(custom_resource(), [again, *workers, started])
    assert (first.message, first.count, first.warning) == ("train: attempt 1 started", 1, False)
    assert (second.count, second.warning, second.message) == (22, True, NO_ROOM)
    assert (second.first, second.last) == (at(10), at(40))
    assert second.objects == ("pod/run-train-0", "pod/run-train-1", "pod/run-train-2")


def test_a_message_with_the_workers_name_is_the_same_cause() -> None:
    found = causes(custom_resource(), [event("Pod", f"run-train-{n}", f"Created pod: run-train-{n}") for n in range(2)])
    assert [cause.count for cause in found] == [2]


def test_an_event_of_the_newer_api_has_its_series() -> None:
    series = {"count": 5, "lastObservedTime": text(at(90))}
    new = event("Pod", "run-train-0", series=series, eventTime=text(at(30)))
    new |= {"firstTimestamp": None, "lastTimestamp": None, "count": None}
    (cause,) = causes(custom_resource(), [new])
    assert (cause.count, cause.first, cause.last) == (5, at(30), at(90))


def test_a_message_is_one_line_and_what_a_terminal_obeys_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(client.Configuration(), "team")
    page = {"items": [event("Pod", "run-train-0", "one\n two\x1b[31m\x07")]}
    monkeypatch.setattr(runs._api, "list_pages", lambda path: [page])
    (cause,) = causes(custom_resource(), runs.events())
    assert cause.message == "one two"

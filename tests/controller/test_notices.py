"""Notices of the ends of runs: when there is one, what receivers get, and what happens when they do not take it."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from controller.builders import NOW, Raw, a_run, at, custom_resource, text
from controller.fake_server import Server
from internvl_api.status import Condition, InternVLFineTuneStatus, Notice, Usage
from internvl_operator import notifier
from internvl_operator.controller import Controller
from internvl_operator.core.notices import body, is_open, next_notice
from internvl_operator.core.run import Key
from internvl_operator.notifier import Notifier, Target, TargetsError, read_targets
from internvl_operator.settings import Settings

Status = InternVLFineTuneStatus


def ended(kind: str, reason: str = "Published", **fields: object) -> Status:
    """A status in which the condition is True; a failed run is stalled too."""
    kinds = ["Failed", "Stalled"] if kind == "Failed" else [kind]
    conditions = [
        Condition(type=each, status="True", reason=reason, message="why <now> & then", last_transition_time=text(NOW))  # type: ignore[arg-type]
        for each in kinds
    ]
    return Status(conditions=conditions, **fields)  # type: ignore[arg-type]


def noticed(old: Status, new: Status, generation: int = 1, delivered: str | None = None) -> Notice | None:
    return next_notice("uid", generation, old, new, delivered, NOW)


@pytest.mark.parametrize("kind", ["Complete", "Failed", "Stalled"])
def test_an_end_is_one_notice_until_it_is_delivered(kind: str) -> None:
    new = ended(kind, "Cause")
    first = noticed(Status(), new)
    assert first is not None
    assert (first.type, first.reason, first.delivered_at) == (kind, "Cause", None)
    new.notice = first
    assert noticed(new, new) == first
    assert is_open(first, NOW)
    sent = noticed(new, new, delivered=first.id)
    assert sent is not None
    assert sent.delivered_at == text(NOW)
    assert not is_open(sent, NOW)


def test_an_end_of_before_the_webhook_is_no_notice() -> None:
    assert noticed(ended("Complete"), ended("Complete")) is None


def test_a_repeated_stall_is_the_same_notice_and_another_one_is_not() -> None:
    first = noticed(Status(), ended("Stalled", "NotFound"))
    running = Status(notice=first)
    assert noticed(running, ended("Stalled", "NotFound", notice=first)) == first
    other, later = noticed(running, ended("Stalled", "AccessDenied")), noticed(running, ended("Stalled", "NotFound"), 2)
    assert len({each.id for each in (first, other, later) if each}) == 3


def test_a_notice_is_given_up_after_a_day() -> None:
    old = Notice(id="a", type="Failed", reason="R", message="", at=text(at(-90_000)))
    assert not is_open(old, NOW)


def test_receivers_get_a_cloud_event_or_a_text() -> None:
    status = ended("Complete", artifacts={"model": "s3://b/m"}, usage=Usage(gpu_hours=4, cost=10, currency="EUR"))
    status.notice = noticed(Status(), status)
    assert status.notice is not None
    kind, data = body("cloudevents", "team-a", "pets", "uid", status)
    event = json.loads(data)
    assert kind == "application/cloudevents+json"
    assert {key: event[key] for key in ("specversion", "id", "type", "subject")} == {
        "specversion": "1.0",
        "id": status.notice.id,
        "type": "dev.internvl.finetune.complete",
        "subject": "team-a/pets",
    }
    assert event["data"]["artifacts"] == {"model": "s3://b/m"}
    assert (event["data"]["gpuHours"], event["data"]["cost"]) == (4.0, 10.0)
    kind, data = body("slack", "team-a", "pets", "uid", status)
    assert kind == "application/json"
    assert json.loads(data) == {
        "text": "*team-a/pets* is complete (4.00 GPU-hours, 10.00 EUR): Published: why &lt;now&gt; &amp; then"
    }


class Receiver(ThreadingHTTPServer):
    """Refuses as many requests as it is told, and keeps the bodies of the others."""

    def __init__(self, refusals: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refusals, self.bodies = refusals, list[dict[str, object]]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/planted-secret"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        refused = self.server.refusals > 0
        if refused:
            self.server.refusals -= 1
        else:
            self.server.bodies.append(json.loads(data))
        self.send_response(503 if refused else 204)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifier, "_FIRST_RETRY", 0.001)


def stalled() -> Status:
    status = ended("Stalled", "NotFound")
    status.notice = noticed(Status(), status)
    return status


def test_a_refused_notice_is_sent_again_and_no_log_shows_the_url(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.refusals = 3
    done = threading.Event()
    sender = Notifier([Target("slack 1", "slack", receiver.url), Target("cloudevents 1", "cloudevents", receiver.url)])
    sender.start(lambda _: done.set())
    status, run = stalled(), a_run()
    assert sender.offer(run, status)
    assert sender.offer(run, status)  # as the next pass does
    assert done.wait(60)
    sender.stop()
    assert status.notice is not None
    assert sender.delivered(Key(run.namespace, run.name)) == status.notice.id
    assert len(receiver.bodies) == 2
    assert "HTTP 503" in caplog.text
    assert "planted-secret" not in caplog.text + repr(sender._targets)


def test_a_receiver_that_is_gone_delays_nobody_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifier, "_MOST", 2)
    sender = Notifier([Target("slack 1", "slack", "http://127.0.0.1:9/x")])
    taken = [sender.offer(a_run(name), stalled()) for name in ("a", "b", "c")]
    assert taken == [True, True, False]


def test_a_redirect_is_no_delivery(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    def redirect(self: _Handler) -> None:
        self.send_response(302)
        self.send_header("Location", receiver.url)
        self.end_headers()

    monkeypatch.setattr(_Handler, "do_POST", redirect)
    assert notifier.post(receiver.url, "application/json", b"{}") == "HTTP 302"
    assert receiver.bodies == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "found 0 URLs, expected 1 to 10"),
        ({"slack": "planted"}, "slack:1: found no http:// or https:// URL"),
        ({"cloudevents": "https://me:planted@x.example/"}, "cloudevents:1: found no http"),
        ({"slack": "https://x.example/planted\n" * 11}, "found 11 URLs"),
    ],
)
def test_unusable_receivers_are_refused_without_showing_them(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TargetsError) as caught:
        read_targets(tmp_path)
    assert message in str(caught.value)
    assert "planted" not in str(caught.value)


def passes(settings: Settings, server: Server, raw: Raw, count: int) -> None:
    """An operator that starts, sees the run and makes this many passes."""
    controller = Controller(settings, server)  # type: ignore[arg-type]
    controller._notifier.start(controller.request)
    controller.run_seen(raw)
    for _ in range(count):
        assert controller.step()
    controller._notifier.stop()


def test_an_end_is_sent_once_over_restarts_and_again_after_a_crash(receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "cloudevents").write_text(receiver.url)
    settings = Settings.from_env({"INTERNVL_OPERATOR_NOTIFICATIONS": str(tmp_path)})
    server = Server()
    raw = server.create(custom_resource(output="nowhere"))  # an invalid spec: stalled at once
    passes(settings, server, raw, 2)  # one finds the end, one follows the delivery
    notice = server.status()["notice"]
    assert notice["type"] == "Stalled"
    assert notice["deliveredAt"]

    raw = raw | {"status": server.status()}
    passes(settings, server, raw, 1)
    assert [each["id"] for each in receiver.bodies] == [notice["id"]]

    raw["status"] = raw["status"] | {"notice": {key: value for key, value in notice.items() if key != "deliveredAt"}}
    passes(settings, server, raw, 2)
    assert [each["id"] for each in receiver.bodies] == [notice["id"]] * 2

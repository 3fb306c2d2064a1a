"""What the controller makes of an API server that misbehaves."""

import asyncio
import threading

import kopf
import pytest
from controller.builders import Raw, custom_resource
from controller.fake_server import Server
from internvl_api.constants import KIND
from internvl_operator import handlers
from internvl_operator.controller import Controller
from internvl_operator.health import Health
from internvl_operator.kube.client import ApiError
from internvl_operator.settings import Settings


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internvl_operator.controller._FIRST_RETRY", 0.001)


def controller_of(server: Server) -> Controller:
    """Nothing is started: a test takes every step itself."""
    return Controller(Settings.from_env({}), server)  # type: ignore[arg-type]


def steps(controller: Controller, count: int) -> None:
    for _ in range(count):
        assert controller.step()


def test_a_server_error_that_stays_reaches_the_user_and_one_that_passes_does_not() -> None:
    server = Server()
    server.refuse = lambda obj: ApiError(500, "InternalError", "failed calling webhook") if _is_pod(obj) else None
    controller = controller_of(server)
    controller.run_seen(server.create(custom_resource()))
    steps(controller, 3)
    assert server.status() == {}
    steps(controller, 1)
    stalled = server.condition("Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "ApiServerError")
    assert "failed calling webhook" in stalled["message"]
    server.refuse = lambda obj: None
    steps(controller, 1)
    assert server.condition("Stalled")["status"] == "False"
    assert "run-preflight-0" in server.pods


def test_a_run_whose_namespace_is_going_is_left_alone() -> None:
    server = Server()
    words = "unable to create new content in namespace team because it is being terminated"
    server.refuse = lambda obj: ApiError(403, "Forbidden", words)
    controller = controller_of(server)
    raw = server.create(custom_resource())
    controller.run_seen(raw)
    steps(controller, 1)
    assert len(server.writes) == 1
    assert controller.run_seen(raw)  # it is not known any more


def test_a_run_deleted_behind_our_back_is_forgotten() -> None:
    server = Server()
    controller = controller_of(server)
    raw = server.create(custom_resource())
    controller.run_seen(raw)
    server.remove(KIND, "run")
    steps(controller, 1)
    assert [verb for verb, _, _ in server.writes][-1] == "status"
    assert controller.run_seen(raw)


def test_one_runs_surprise_does_not_stop_the_others() -> None:
    server = Server()
    controller = controller_of(server)
    strange = custom_resource("strange")
    strange["metadata"] |= {"uid": "2", "generation": "not a number"}
    controller.run_seen(server.create(strange))
    controller.run_seen(server.create(custom_resource()))
    steps(controller, 2)
    assert "run-preflight-0" in server.pods


def test_an_event_of_our_own_write_causes_no_pass() -> None:
    server = Server()
    controller = controller_of(server)
    controller.run_seen(server.create(custom_resource()))
    steps(controller, 1)
    (own,) = [raw for kind, what, raw in server.log if (kind, what) == ("MODIFIED", KIND)]
    assert not controller.run_seen(own)


def test_without_the_crd_the_start_is_tried_again_and_says_why() -> None:
    class NotFound:
        def get(self, path: str) -> Raw:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")

    memo = kopf.Memo(
        settings=Settings.from_env({}), api=NotFound(), controller=None, health=Health(), stop=threading.Event()
    )
    with pytest.raises(kopf.TemporaryError, match="is the CRD installed"):
        asyncio.run(handlers.start(settings=kopf.OperatorSettings(), memo=memo))


def _is_pod(obj: Raw) -> bool:
    return bool(obj["kind"] == "Pod")

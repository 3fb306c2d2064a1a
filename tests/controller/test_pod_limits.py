"""Pods that answer slowly, endlessly or with nonsense cost their own namespace only."""

import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from controller.builders import member
from internvl_operator.core.run import Key
from internvl_operator.polling import pod_request, progress_poller, rank_probe
from internvl_operator.polling.fair_queue import FairQueue
from internvl_operator.polling.progress_poller import ProgressPoller
from internvl_operator.polling.rank_probe import RankProbe

SLOW, HEALTHY = "127.0.0.2", "127.0.0.1"
Act = Callable[[socket.socket, threading.Event], None]


class Pods:
    """Servers on loopback addresses that share a port; each connection is handed to `act`."""

    def __init__(self) -> None:
        self.over, self.port = threading.Event(), 0
        self._sockets: list[socket.socket] = []

    def add(self, address: str, act: Act) -> None:
        server = socket.create_server((address, self.port), backlog=64)
        self.port = server.getsockname()[1]
        self._sockets.append(server)
        threading.Thread(target=self._accept, args=(server, act), daemon=True).start()

    def close(self) -> None:
        self.over.set()
        for server in self._sockets:
            server.close()

    def _accept(self, server: socket.socket, act: Act) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection, act), daemon=True).start()

    def _serve(self, connection: socket.socket, act: Act) -> None:
        with connection:
            try:
                connection.recv(4096)
                act(connection, self.over)
            except OSError:
                return


def sends(answer: bytes) -> Act:
    return lambda connection, over: connection.sendall(answer)


def drips(connection: socket.socket, over: threading.Event) -> None:
    """One byte at a time, for as long as the test runs."""
    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
    while not over.wait(0.05):
        connection.sendall(b" ")


def counts() -> Act:
    """Another step in each answer."""
    steps = iter(range(1_000_000))
    return lambda connection, over: connection.sendall(ok(json.dumps({"step": next(steps)}).encode()))


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + body


@pytest.fixture
def pods(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pods]:
    made = Pods()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        pytest.param(ok(b"{}"), b"{}", id="right"),
        pytest.param(ok(b"x" * pod_request.BODY_LIMIT), b"x" * pod_request.BODY_LIMIT, id="as-long-as-allowed"),
        pytest.param(ok(b"x" * (pod_request.BODY_LIMIT + 1)), None, id="one-byte-too-long"),
        pytest.param(ok(b"x" * 1_000_000), None, id="far-too-long"),
        pytest.param(b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\n\r\n", None, id="redirect"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000, None, id="endless-head"),
        pytest.param(b"\x00\xff" * 100, None, id="not-http"),
        pytest.param(b"", None, id="nothing"),
    ],
)
def test_an_answer_is_whole_and_bounded_or_none(pods: Pods, answer: bytes, body: bytes | None) -> None:
    pods.add(HEALTHY, sends(answer))
    assert pod_request.get(HEALTHY, pods.port, "/progress", deadline=30) == body


def test_the_deadline_covers_the_whole_answer(pods: Pods) -> None:
    pods.add(SLOW, drips)
    assert pod_request.get(SLOW, pods.port, "/progress", deadline=0.3) is None


@pytest.mark.parametrize("address", ["metadata.internal", "127.0.0.1/x", "", "127.0.0.1\r\nX: y"])
def test_only_addresses_are_connected_to(address: str) -> None:
    assert pod_request.get(address, 1, "/progress") is None


def test_namespaces_take_turns_and_none_gets_every_thread() -> None:
    queue: FairQueue[Key] = FairQueue(threads=4)
    for number in range(5):
        queue.add(Key("slow", str(number)))
    queue.add(Key("team", "run"))
    taken = [queue.get() for _ in range(3)]
    assert taken == [Key("slow", "0"), Key("team", "run"), Key("slow", "1")]
    assert queue._pop() is None  # two threads are left, and both are for others
    queue.add(Key("team", "other"))
    assert queue.get() == Key("team", "other")
    queue.done(Key("slow", "0"))
    assert queue.get() == Key("slow", "2")
    assert len(queue) == 2


def test_slow_pods_of_one_namespace_leave_others_their_updates(pods: Pods, monkeypatch: pytest.MonkeyPatch) -> None:
    pods.add(SLOW, drips)
    pods.add(HEALTHY, counts())
    monkeypatch.setattr(progress_poller, "METRICS_PORT", pods.port)
    updates = threading.Semaphore(0)
    poller = ProgressPoller(lambda key: updates.release(), interval=0.01, threads=2)
    poller.start()
    for number in range(8):
        poller.follow(Key("slow", f"run-{number}"), f"pod-{number}", SLOW)
    poller.follow(Key("team", "run"), "pod", HEALTHY)
    try:
        for _ in range(24):
            assert updates.acquire(timeout=30)
    finally:
        poller.stop()
    assert poller.latest(Key("slow", "run-0")) is None


def test_slow_processes_of_one_namespace_leave_others_their_probe(pods: Pods, monkeypatch: pytest.MonkeyPatch) -> None:
    pods.add(SLOW, drips)
    pods.add(HEALTHY, counts())
    monkeypatch.setattr(progress_poller, "METRICS_PORT", pods.port)
    told = threading.Event()
    probe = RankProbe(lambda key: told.set() if key.namespace == "team" else None, threads=2)
    probe.start()
    for number in range(8):
        probe.ask(Key("slow", f"run-{number}"), [member(rank, ip=SLOW) for rank in range(64)], processes=1)
    probe.ask(Key("team", "run"), [member(0, ip=HEALTHY)], processes=1)
    try:
        assert told.wait(timeout=15)
    finally:
        probe.stop()
    found = probe.latest(Key("team", "run"))
    assert found is not None
    assert found.states[0].progress is not None


def test_a_probe_has_an_end_however_many_processes_are_silent(pods: Pods, monkeypatch: pytest.MonkeyPatch) -> None:
    pods.add(HEALTHY, counts())
    monkeypatch.setattr(progress_poller, "METRICS_PORT", pods.port)
    monkeypatch.setattr(rank_probe, "_LONGEST_PROBE", -1.0)  # over as soon as it begins
    told = threading.Event()
    probe = RankProbe(lambda key: told.set(), threads=2)
    probe.start()
    probe.ask(Key("team", "run"), [member(rank, ip=HEALTHY) for rank in range(64)], processes=8)
    assert told.wait(timeout=15)
    probe.stop()
    found = probe.latest(Key("team", "run"))
    assert found is not None
    assert [state.progress for state in found.states] == [None] * 512

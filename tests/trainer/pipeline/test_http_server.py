"""The server of /metrics and /progress in front of slow, many and vanishing clients."""

from __future__ import annotations

import json
import socket
import struct
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from internvl_trainer import http_server
from internvl_trainer.distributed import free_port
from internvl_trainer.metrics import Reporter


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Reporter, int]]:
    port = free_port()
    monkeypatch.setenv("INTERNVL_METRICS_PORT", str(port))
    reporter = Reporter("team/run", "train")
    reporter.serve()
    yield reporter, port
    reporter.close()


def get(host: str, port: int, path: str = "/healthz") -> bytes:
    with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=30) as answer:
        body: bytes = answer.read()
        return body


def closed_by_server(connection: socket.socket) -> bool:
    connection.settimeout(30)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_it_answers_on_ipv4_and_ipv6(server: tuple[Reporter, int], host: str) -> None:
    if host == "[::1]" and not http_server._has_ipv6():
        pytest.skip("this machine has no IPv6")
    assert get(host, server[1]) == b"ok\n"


def test_idle_connections_are_few_and_end(server: tuple[Reporter, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """400 idle connections made 400 threads that never ended."""
    monkeypatch.setattr(http_server, "DEADLINE_SECONDS", 1.0)
    _, port = server
    threads = threading.active_count()
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 30)) for _ in range(60)]
        assert all(closed_by_server(connection) for connection in idle)
        assert threading.active_count() <= threads + http_server.MOST_CONNECTIONS
    assert get("127.0.0.1", port) == b"ok\n"
    metrics = get("127.0.0.1", port, "/metrics").decode()
    line = next(line for line in metrics.splitlines() if line.startswith("internvl_http_dropped_connections{"))
    assert float(line.rpartition(" ")[2]) == 60


def test_a_client_that_sends_one_byte_at_a_time_is_ended(
    server: tuple[Reporter, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "DEADLINE_SECONDS", 1.0)
    stop = threading.Event()
    with socket.create_connection(("127.0.0.1", server[1]), 30) as connection:

        def drip() -> None:
            try:
                while not stop.wait(0.1):
                    connection.sendall(b"G")
            except OSError:
                return

        dripping = threading.Thread(target=drip)
        dripping.start()
        assert closed_by_server(connection)
        stop.set()
        dripping.join()


def test_a_client_that_goes_away_is_counted_and_not_logged(
    server: tuple[Reporter, int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter, port = server
    asked = threading.Event()
    gone = threading.Event()

    def answer(path: str) -> tuple[str, bytes]:
        asked.set()
        gone.wait(30)
        return "text/plain", b"x" * (64 << 20)

    with monkeypatch.context() as patch:
        patch.setattr(reporter, "answer", answer)
        with socket.create_connection(("127.0.0.1", port), 30) as connection:
            connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert asked.wait(30)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.set()
    while reporter._server and reporter._server._live:  # the deadline of the connection bounds this
        get("127.0.0.1", port)
    assert json.loads(get("127.0.0.1", port, "/progress"))["stage"] == "train"
    assert reporter._server is not None
    assert reporter._server.dropped == 1
    assert "Traceback" not in capfd.readouterr().err

"""Strangers at the operator's ports: what they send is bounded in size, time and number."""

import http.client
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from controller.builders import custom_resource
from internvl_api.validation.policy import Policy
from internvl_operator import http_server, metrics_server, webhook
from internvl_operator.health import Health
from internvl_operator.http_server import Handler, Server, TlsFolder
from ivft_cluster.pki import Authority
from ivft_cluster.shell import wait_for

REVIEW = json.dumps({"apiVersion": "admission.k8s.io/v1", "request": {"uid": "7"}}).encode()


class Echo(Handler):
    def do_GET(self) -> None:
        self.answer(200, b"ok")

    def do_POST(self) -> None:
        body = self.read_body(1000)
        if body is not None:
            self.answer(200, str(len(body)).encode())


Start = Callable[..., Server]


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[Server] = []

    def act(handler: type[Handler] = Echo, **limits: Any) -> Server:
        made.append(Server(0, handler, name="test", **limits).start())
        return made[-1]

    yield act
    for server in made:
        server.shutdown()
        server.server_close()


def send(server: Server, text: bytes, host: str = "127.0.0.1") -> bytes:
    """The whole answer to these bytes; the connection is kept open for writing."""
    with socket.create_connection((host, server.server_port), timeout=30) as connection:
        connection.sendall(text)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def post(headers: bytes, body: bytes = b"") -> bytes:
    return b"POST / HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n" + body


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param(b"Content-Length: -1\r\n", b"400", id="negative"),
        pytest.param(b"Content-Length: many\r\n", b"400", id="a-word"),
        pytest.param(b"Content-Length: 1_0\r\n", b"400", id="underscore"),
        pytest.param("Content-Length: ²\r\n".encode(), b"400", id="superscript"),
        pytest.param(b"Content-Length: 1\r\nContent-Length: 2\r\n", b"400", id="twice"),
        pytest.param(b"", b"411", id="missing"),
        pytest.param(b"Transfer-Encoding: chunked\r\n", b"411", id="chunked"),
        pytest.param(b"Content-Length: 1001\r\n", b"413", id="too-long"),
        pytest.param(b"Content-Length: " + b"9" * 5000 + b"\r\n", b"413", id="5000-digits"),
    ],
)
def test_a_body_without_a_usable_length_is_refused_before_it_is_read(
    start: Start, headers: bytes, status: bytes
) -> None:
    assert send(start(), post(headers)).split(b" ")[1] == status


def test_a_body_within_the_limit_is_read(start: Start) -> None:
    assert send(start(), post(b"Content-Length: 1000\r\n", b"x" * 1000)).endswith(b"\r\n\r\n1000")


def test_a_head_without_end_is_cut_off(start: Start) -> None:
    def flood() -> None:
        for _ in range(100_000):
            connection.sendall(b"X: " + b"y" * 1000 + b"\r\n")

    with socket.create_connection(("127.0.0.1", start().server_port), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            flood()


def test_a_connection_has_a_deadline_whatever_its_pace(start: Start) -> None:
    server, over = start(seconds=0.3), threading.Event()
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:

        def drip() -> None:
            while not over.wait(0.02):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

        threading.Thread(target=drip, daemon=True).start()
        with suppress(ConnectionError):
            assert connection.recv(100) == b""
        over.set()


def test_idle_connections_neither_pile_up_nor_keep_a_probe_out(start: Start) -> None:
    server = start(connections=4)
    before = threading.active_count()
    idle = [socket.create_connection(("127.0.0.1", server.server_port), timeout=30) for _ in range(40)]
    try:
        assert send(server, b"GET / HTTP/1.0\r\n\r\n").endswith(b"ok")
        # A thread whose connection was closed for a newer one takes a moment to end.
        wait_for("an end of the other threads", lambda: threading.active_count() - before <= 2 * 4)
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_probes_metrics_and_webhook_answer_on_both_families(host: str) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("this machine has no ::1")
    for server in (Health().serve(0), metrics_server.serve(0)):
        try:
            assert send(server, b"GET /metrics HTTP/1.0\r\n\r\n", host).startswith(b"HTTP/1.0 ")
        finally:
            server.shutdown()
            server.server_close()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_a_node_without_ipv6_gets_ipv4(monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    monkeypatch.setattr(http_server.socket, "has_dualstack_ipv6", lambda: False)
    server = start()
    assert server.socket.family == socket.AF_INET
    assert send(server, b"GET / HTTP/1.0\r\n\r\n").endswith(b"ok")


def test_a_port_in_use_is_an_error(start: Start) -> None:
    taken = start()
    with pytest.raises(OSError, match="in use"):
        Server(taken.server_port, Echo, name="second")


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A folder with tls.crt and tls.key."""
    folder = tmp_path / "secret"
    authority = Authority.create(folder)
    authority.issue("tls", "operator", hosts=["127.0.0.1"])
    return folder


@pytest.mark.parametrize(
    ("header", "status"),
    [
        pytest.param({}, 401, id="nothing"),
        pytest.param({"Authorization": "Bearer wrong"}, 401, id="another-token"),
        pytest.param({"Authorization": "Basic secret"}, 401, id="another-scheme"),
        pytest.param({"Authorization": "Bearer s\u00e9cret"}, 401, id="not-ascii"),
        pytest.param({"Authorization": "Bearer secret"}, 200, id="right"),
    ],
)
def test_metrics_with_a_secret_need_its_token(certificates: Path, header: dict[str, str], status: int) -> None:
    (certificates / "token").write_text("secret\n", encoding="utf-8")
    server = metrics_server.serve(0, certificates)
    context = ssl._create_unverified_context()
    connection = http.client.HTTPSConnection("127.0.0.1", server.server_port, context=context, timeout=30)
    try:
        connection.request("GET", "/metrics", headers=header)
        answer = connection.getresponse()
        assert answer.status == status
        assert (b"internvl_operator_reconcile_seconds" in answer.read()) == (status == 200)
    finally:
        connection.close()
        server.shutdown()
        server.server_close()


def test_an_empty_token_opens_nothing(certificates: Path) -> None:
    (certificates / "token").write_text("\n", encoding="utf-8")
    with pytest.raises(OSError, match="expected the token"):
        metrics_server.serve(0, certificates)


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"request":' * 50_000, b"\xff", REVIEW[:-1], b"null", b"9" * 5000])
def test_a_review_of_any_shape_is_answered(certificates: Path, body: bytes) -> None:
    server = webhook.serve(0, TlsFolder(certificates).context)
    context = ssl._create_unverified_context()
    connection = http.client.HTTPSConnection("127.0.0.1", server.server_port, context=context, timeout=30)
    try:
        connection.request("POST", webhook.PATH, body)
        assert connection.getresponse().status == 400
        connection.close()
        connection.request("POST", webhook.PATH, REVIEW)
        assert json.loads(connection.getresponse().read())["response"] == {"uid": "7", "allowed": True}
    finally:
        connection.close()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("policy", "allowed"), [(Policy(), True), (Policy(images=()), False)])
def test_the_webhook_answers_by_the_policy_it_is_given(certificates: Path, policy: Policy, allowed: bool) -> None:
    server = webhook.serve(0, TlsFolder(certificates).context, webhook.Known(policy))
    context = ssl._create_unverified_context()
    connection = http.client.HTTPSConnection("127.0.0.1", server.server_port, context=context, timeout=30)
    request = {"uid": "7", "object": custom_resource(podTemplate={"image": "any"})}
    try:
        connection.request("POST", webhook.PATH, json.dumps({"apiVersion": "admission.k8s.io/v1", "request": request}))
        assert json.loads(connection.getresponse().read())["response"]["allowed"] is allowed
    finally:
        connection.close()
        server.shutdown()
        server.server_close()

"""Between an operator and its API server: forwards, records what is written, and misbehaves as a test says."""

import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import yaml
from controller.builders import Raw
from ivft_cluster.api_server import ApiServer

_HOP = ("transfer-encoding", "connection", "content-length")


@dataclass(frozen=True)
class Request:
    """One request as the operator sent it. `at` is this machine's monotonic clock."""

    method: str
    path: str
    query: dict[str, list[str]]
    at: float

    @property
    def watch(self) -> bool:
        return "watch" in self.query

    @property
    def write(self) -> bool:
        """Of anything but the Lease."""
        return self.method != "GET" and "/leases" not in self.path


@dataclass(frozen=True)
class Answer:
    """Answer so, instead of the API server: with a Status of this message, or with `body` as it is."""

    status: int
    message: str = ""
    body: str = ""


@dataclass(frozen=True)
class AnswerLost:
    """Let the API server do it, then (after `meanwhile`) close the connection without a word."""

    meanwhile: Callable[[], object] = lambda: None


class Unreachable:
    """Close the connection; the API server hears nothing."""


Fault = Answer | AnswerLost | Unreachable | None


class FaultyProxy:
    """Plain HTTP in, TLS out, with the token that it was sent; point an operator's KUBECONFIG at `kubeconfig`."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        pki = server.control_plane.pki
        self._tls = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self._upstream = urlsplit(server.url)
        self.fault: Callable[[Request], Fault] = lambda request: None
        self.requests: list[Request] = []
        self.lost: Callable[[Raw], bool] = lambda event: False  # of a watch: events that are not passed on
        self.flowing = threading.Event()  # cleared: nothing of an open stream is passed on
        self.flowing.set()
        self._streams: set[socket.socket] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.kubeconfig = folder / f"proxy-{self._server.server_port}.kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(self._config()))

    @property
    def writes(self) -> list[Request]:
        """What the operator wrote, or tried to."""
        return [request for request in list(self.requests) if request.write]

    def cut(self) -> None:
        """Break every watch that is open."""
        for stream in list(self._streams):
            with suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.flowing.set()
        self.cut()
        self._server.shutdown()
        self._server.server_close()

    def _config(self) -> dict[str, object]:
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{self._server.server_port}"}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self) -> None:
                with suppress(ConnectionError):  # an operator that was killed
                    super().handle()

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                request = Request(self.command, parts.path, parse_qs(parts.query), time.monotonic())
                proxy.requests.append(request)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with suppress(OSError, http.client.HTTPException):
                    self._act(request, body, proxy.fault(request))

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

            def _act(self, request: Request, body: bytes, fault: Fault) -> None:
                if isinstance(fault, Answer):
                    words = {"kind": "Status", "code": fault.status, "reason": "Injected", "message": fault.message}
                    return self._answer(fault.status, (fault.body or json.dumps(words)).encode())
                if isinstance(fault, Unreachable):
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                connection = http.client.HTTPSConnection(proxy._upstream.netloc, context=proxy._tls, timeout=120)
                headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", *_HOP)}
                connection.request(self.command, self.path, body or None, headers)
                answer = connection.getresponse()
                if isinstance(fault, AnswerLost):
                    answer.read()
                    fault.meanwhile()
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                if request.watch and answer.status == 200:
                    return self._stream(answer)
                return self._answer(answer.status, answer.read(), answer.getheader("Content-Encoding", "identity"))

            def _answer(self, status: int, body: bytes, encoding: str = "identity") -> None:
                self.send_response(status)
                self.send_header("Content-Encoding", encoding)  # large answers are compressed for who takes them so
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _stream(self, answer: http.client.HTTPResponse) -> None:
                self.close_connection = True
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                proxy._streams.add(self.connection)
                buffer = b""
                try:
                    while True:
                        chunk = answer.read1(65536)
                        proxy.flowing.wait()  # also with the end of the stream
                        *lines, buffer = (buffer + chunk).split(b"\n")
                        kept = b"".join(line + b"\n" for line in lines if not proxy.lost(json.loads(line)))
                        if kept or not chunk:  # an empty chunk is the end
                            self.wfile.write(b"%x\r\n%s\r\n" % (len(kept), kept))
                        if not chunk:
                            return
                finally:
                    proxy._streams.discard(self.connection)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

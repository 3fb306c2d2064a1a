"""Between a client and the real S3 server: records every request, and lets single ones wait, fail or pass."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>made by the test</Message></Error>'


class S3Request(NamedTuple):
    """`key` is without the bucket; `part` of a multipart upload; `copied`: the server copies, nothing is sent."""

    method: str
    key: str
    query: dict[str, list[str]]
    copied: bool

    @property
    def part(self) -> str | None:
        return self.query.get("partNumber", [None])[0]

    @property
    def writes(self) -> bool:
        """Whether it sends or copies content."""
        return self.method in ("PUT", "POST")


class S3Proxy:
    """Forwards to `endpoint`. What `held` accepts is never answered, what `refused` accepts gets an error."""

    def __init__(self, endpoint: str) -> None:
        self._host, self._port = urlsplit(endpoint).hostname or "", urlsplit(endpoint).port
        self.requests: list[S3Request] = []
        self.held: Callable[[S3Request], bool] = lambda _: False
        self.refused: Callable[[S3Request], tuple[int, str] | None] = lambda _: None
        self.refused_after: Callable[[S3Request], tuple[int, str] | None] = lambda _: None  # but the server has done it
        self.reached = threading.Event()  # a request is held
        self._released = threading.Event()
        self.url = ""

    def hold(self, which: Callable[[S3Request], bool]) -> None:
        """From now on; what was held before is dropped."""
        self._released.set()
        self._released, self.reached, self.held = threading.Event(), threading.Event(), which

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        """Any request."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        url = urlsplit(handler.path)
        key = unquote(re.sub(r"^/[^/]+/?", "", url.path))
        copied = "x-amz-copy-source" in handler.headers
        request = S3Request(handler.command, key, parse_qs(url.query, keep_blank_values=True), copied)
        released = self._released
        self.requests.append(request)
        if self.held(request):
            self.reached.set()
            released.wait()
            handler.close_connection = True
        elif refusal := self.refused(request):
            self._answer(handler, refusal[0], {"Content-Type": "application/xml"}, _error(refusal[1]))
        else:
            self._forward(handler, body, self.refused_after(request))

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes, refusal: tuple[int, str] | None) -> None:
        connection = http.client.HTTPConnection(self._host, self._port)
        try:
            connection.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in handler.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            if refusal:
                answer.read()
                self._answer(handler, refusal[0], {"Content-Type": "application/xml"}, _error(refusal[1]))
                return
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _OF_THE_CONNECTION}
            if handler.command == "HEAD":
                headers["Content-Length"] = answer.getheader("Content-Length", "0")
            self._answer(handler, answer.status, headers, answer.read())
        finally:
            connection.close()

    def _answer(self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
        handler.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)


_OF_THE_CONNECTION = {"connection", "content-length", "transfer-encoding", "keep-alive"}


def _error(code: str) -> bytes:
    return _ERROR.format(code=code).encode()


@contextmanager
def proxied(endpoint: str) -> Iterator[S3Proxy]:
    """A proxy on a free port of 127.0.0.1."""
    proxy = S3Proxy(endpoint)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            proxy.handle(self)

        do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            """The tests read `requests`."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that was killed is what the tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.hold(lambda _: False)
        server.shutdown()
        server.server_close()
        thread.join()

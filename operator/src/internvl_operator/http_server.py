"""The HTTP server of probes, metrics and webhook: whoever connects, its memory, threads and time are bounded.

A connection carries one request and ends after `seconds`. When all connections are taken, the oldest is closed: a probe
ends within milliseconds, so the oldest is an idle one.
"""

import errno
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CONNECTIONS = 32
SECONDS = 10.0  # from the first packet of a connection to its end
_HEAD_LIMIT = 32 * 1024  # bytes of a request line and its headers
_LARGE = 256 * 1024  # bytes of a body; larger ones are read two at a time
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)

logger = logging.getLogger(__name__)


class Handler(BaseHTTPRequestHandler):
    """Base class of the handlers: reads bounded heads and bodies, writes whole answers, logs nothing."""

    timeout = SECONDS
    server: "Server"

    def setup(self) -> None:
        """Bound the head of the request."""
        super().setup()
        self.rfile = _BoundedHead(self.rfile)  # type: ignore[assignment]

    def answer(self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        """Send a whole answer."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def read_body(self, limit: int) -> bytes | None:
        """The body of the request; None after an error was sent, before anything was read."""
        given = self.headers.get_all("Content-Length") or []
        refusal = None
        if not given or self.headers.get("Transfer-Encoding"):
            refusal = 411, "send Content-Length and no Transfer-Encoding"
        elif len(given) > 1 or not (given[0].isascii() and given[0].isdigit()):
            refusal = 400, "Content-Length: expected one number of bytes"
        elif len(given[0]) > 18 or int(given[0]) > limit:
            refusal = 413, f"Content-Length: found {given[0][:18]}, expected at most {limit}"
        if refusal:
            self.answer(refusal[0], f"{refusal[1]}\n".encode())
            return None
        length = int(given[0])
        if length <= _LARGE:
            return self.rfile.read(length)
        with self.server.large_bodies:
            return self.rfile.read(length)

    def log_message(self, *_: object) -> None:
        """Log nothing: probes, scrapes and reviews come all the time."""


class Server(ThreadingHTTPServer):
    """Serves from its own thread once `start` is called. Raises OSError when the port or the certificate is unusable.

    It listens on IPv6 and IPv4; on IPv4 alone where the node has no IPv6. With `tls` it serves TLS; `tls` is asked for
    the context of each connection, and its OSError ends the connection.
    """

    daemon_threads = True

    def __init__(
        self,
        port: int,
        handler: type[Handler],
        *,
        name: str,
        tls: Callable[[], ssl.SSLContext] | None = None,
        connections: int = CONNECTIONS,
        seconds: float = SECONDS,
    ) -> None:
        self._name, self._limit, self._seconds = name, connections, seconds
        self.large_bodies = threading.BoundedSemaphore(2)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}  # connection -> when it was accepted, oldest first
        self._running = 0  # threads; one may outlive its connection for a moment
        self._tls = tls
        super().__init__(("", port), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = _listen(port)
        self.server_address = self.socket.getsockname()
        self.server_port: int = self.server_address[1]

    def start(self) -> "Server":
        """Serve from now on."""
        threading.Thread(target=self.serve_forever, name=self._name, daemon=True).start()
        return self

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; its handshake runs in its own thread, so that no client can block the others."""
        connection, address = self.socket.accept()
        connection.settimeout(self._seconds)
        if self._tls is None:
            return connection, address
        try:
            context = self._tls()
            return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address
        except OSError as error:
            logger.debug("%s: no TLS for %s: %s", self._name, address, error)
            connection.close()
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand the connection to a thread; close the oldest when there are too many."""
        with self._lock:
            full = self._running >= 2 * self._limit
            if not full:
                self._running += 1
                self._open[request] = time.monotonic()
            oldest = next(iter(self._open)) if len(self._open) > self._limit else None
        if oldest is not None:
            self._cut(oldest)
        if full:
            return self.shutdown_request(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle the request."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._running -= 1

    def shutdown_request(self, request: Any) -> None:
        """Close the connection."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Close the connections whose time is over; called twice a second."""
        now = time.monotonic()
        with self._lock:
            late = [connection for connection, since in self._open.items() if now - since > self._seconds]
        for connection in late:
            self._cut(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a client did to its own connection."""
        logger.debug("%s: connection from %s failed", self._name, client_address, exc_info=True)

    def _cut(self, connection: socket.socket) -> None:
        """End the connection under its thread, which then closes it."""
        with self._lock:
            self._open.pop(connection, None)
        try:
            socket.socket.shutdown(connection, socket.SHUT_RDWR)  # of the socket below TLS
        except OSError:  # closed already
            logger.debug("%s: the connection is closed already", self._name)


class _BoundedHead:
    """A reader whose lines are at most `_HEAD_LIMIT` bytes in all; `read` is for the body."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._left = stream, _HEAD_LIMIT
        self.read, self.close = stream.read, stream.close

    @property
    def closed(self) -> bool:
        return bool(self._stream.closed)

    def readline(self, size: int = -1) -> bytes:
        line: bytes = self._stream.readline(min(self._left + 1, size if size >= 0 else self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise ConnectionError(f"the head of the request is longer than {_HEAD_LIMIT} bytes")
        return line


class TlsFolder:
    """The TLS context of a folder with tls.crt and tls.key, reloaded when they change. Raises OSError."""

    def __init__(self, folder: Path) -> None:
        self._files = folder / "tls.crt", folder / "tls.key"
        self._loaded: tuple[float, ...] = ()
        self._load()

    def context(self) -> ssl.SSLContext:
        """The context for the next connection."""
        try:
            self._load()
        except OSError as error:  # renewal in progress: the loaded certificate still serves
            logger.warning("cannot reload %s: %s; serving the loaded certificate", self._files[0], error)
        return self._context

    def _load(self) -> None:
        times = tuple(file.stat().st_mtime for file in self._files)
        if times != self._loaded:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # a new one: half a load would spoil the old one
            context.load_cert_chain(*self._files)
            self._context, self._loaded = context, times


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", port), family=socket.AF_INET6, backlog=CONNECTIONS, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in _NO_IPV6:
                raise
    return socket.create_server(("", port), backlog=CONNECTIONS)

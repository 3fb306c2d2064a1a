"""An HTTP server for strangers: few connections at a time, each with a total deadline, on IPv4 and IPv6."""

from __future__ import annotations

import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MOST_CONNECTIONS = 32
DEADLINE_SECONDS = 10.0
"""For a whole connection, from its acceptance to the last byte of the answer."""


class BoundedServer(ThreadingHTTPServer):
    """Closes connections above MOST_CONNECTIONS and those past their deadline; `dropped` counts both.

    A client that goes away in the middle of an answer is counted too, and nothing is logged.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.dropped = 0
        self._live: dict[socket.socket, float] = {}  # connection to its deadline
        self._mutex = threading.Lock()
        self.address_family = socket.AF_INET6 if _has_ipv6() else socket.AF_INET
        super().__init__(("", port), handler)

    def server_bind(self) -> None:
        """Bind; an IPv6 socket takes IPv4 connections too."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection, unless there are too many."""
        with self._mutex:
            full = len(self._live) >= MOST_CONNECTIONS
            if not full:
                self._live[request] = time.monotonic() + DEADLINE_SECONDS
        if full:
            self._drop()
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget and close a connection."""
        with self._mutex:
            self._live.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End connections past their deadline; `serve_forever` calls this twice a second."""
        now = time.monotonic()
        with self._mutex:
            late = [connection for connection, deadline in self._live.items() if deadline < now]
            for connection in late:
                del self._live[connection]
        for connection in late:
            self._drop()
            try:
                connection.shutdown(socket.SHUT_RDWR)  # its thread wakes up and closes it
            except OSError:
                continue  # it is closed already

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Count a client that went away; any other error is a defect and is shown."""
        if isinstance(sys.exc_info()[1], OSError):
            self._drop()
        else:
            super().handle_error(request, client_address)

    def _drop(self) -> None:
        with self._mutex:
            self.dropped += 1


def _has_ipv6() -> bool:
    """Whether this machine can bind an IPv6 socket that takes IPv4 connections too."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind(("::", 0))
    except OSError:
        return False
    return True

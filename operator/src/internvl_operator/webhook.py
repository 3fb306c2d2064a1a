"""Admission webhook: refuse at `kubectl apply` what a schema cannot express, with the messages of the operator.

Every replica answers, leading or not. The webhook is optional: the operator makes the same checks itself.
"""

import json
import logging
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from internvl_api.validation.check import check_spec
from internvl_api.validation.cluster import InCluster
from internvl_api.validation.violations import SpecError, Violation

from internvl_operator.core.run import read_status

PATH = "/validate"
_BODY_LIMIT = 8 * 2**20  # bytes; an object has at most 1.5 MB, and an update contains two
_TIMEOUT = 10.0  # seconds for one read or write of a connection

Raw = dict[str, Any]
logger = logging.getLogger(__name__)


def review(asked: Raw) -> Raw:
    """The AdmissionReview with the answer."""
    request = asked["request"]
    response: Raw = {"uid": request["uid"], "allowed": True}
    # What was wrong before may still be suspended, labelled or deleted.
    before = _violations(request.get("oldObject"))
    if wrong := [each for each in _violations(request.get("object")) if each not in before]:
        response |= {"allowed": False, "status": {"code": 422, "reason": "Invalid", "message": str(SpecError(*wrong))}}
    return {"apiVersion": asked["apiVersion"], "kind": "AdmissionReview", "response": response}


def serve(port: int, certificates: Path) -> ThreadingHTTPServer:
    """Start answering, with tls.crt and tls.key of a folder, reloaded when they change. Raises OSError."""
    server = _Server(("", port), _Handler, certificates)
    threading.Thread(target=server.serve_forever, name="webhook", daemon=True).start()
    return server


def _violations(raw: Raw | None) -> tuple[Violation, ...]:
    if not raw or "deletionTimestamp" in raw["metadata"]:
        return ()
    return check_spec(raw.get("spec"), InCluster.of(read_status(raw.get("status") or {}))).violations


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], certificates: Path) -> None:
        self._files = certificates / "tls.crt", certificates / "tls.key"
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._loaded: tuple[float, ...] = ()
        self._load()
        super().__init__(address, handler)

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        try:
            self._load()
        except OSError as error:  # renewal in progress: the loaded certificate still serves
            logger.warning("cannot reload the webhook's certificate: %s; serving the loaded one", error)
        # The handshake runs in the connection's own thread, so that no client can block the others.
        return self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

    def _load(self) -> None:
        times = tuple(file.stat().st_mtime for file in self._files)
        if times != self._loaded:
            self._context.load_cert_chain(*self._files)
            self._loaded = times

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("webhook connection from %s failed", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _TIMEOUT

    def do_POST(self) -> None:
        """AdmissionReview in, AdmissionReview out; 400 for anything else."""
        length = int(self.headers.get("Content-Length") or 0)
        if self.path.partition("?")[0] != PATH or length > _BODY_LIMIT:
            return self.send_error(404 if length <= _BODY_LIMIT else 413)
        try:
            body = json.dumps(review(json.loads(self.rfile.read(length)))).encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            return self.send_error(400, "expected an AdmissionReview")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing: every apply of a run is a request."""

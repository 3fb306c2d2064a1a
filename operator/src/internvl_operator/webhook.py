"""Admission webhook: refuse at `kubectl apply` what a schema cannot express, with the messages of the operator.

Every replica answers, leading or not. The webhook is optional: the operator makes the same checks itself.
"""

import json
import ssl
from collections.abc import Callable
from typing import Any

from internvl_api.validation.check import check_spec
from internvl_api.validation.cluster import InCluster
from internvl_api.validation.violations import SpecError, Violation

from internvl_operator.core.run import read_status
from internvl_operator.http_server import Handler, Server

PATH = "/validate"
_BODY_LIMIT = 8 * 2**20  # bytes; an object has at most 1.5 MB, and an update contains two

Raw = dict[str, Any]


def review(asked: Raw) -> Raw:
    """The AdmissionReview with the answer."""
    request = asked["request"]
    response: Raw = {"uid": request["uid"], "allowed": True}
    # What was wrong before may still be suspended, labelled or deleted.
    before = _violations(request.get("oldObject"))
    if wrong := [each for each in _violations(request.get("object")) if each not in before]:
        response |= {"allowed": False, "status": {"code": 422, "reason": "Invalid", "message": str(SpecError(*wrong))}}
    return {"apiVersion": asked["apiVersion"], "kind": "AdmissionReview", "response": response}


def serve(port: int, tls: Callable[[], ssl.SSLContext]) -> Server:
    """Start answering; `tls` gives the context of each connection. Raises OSError."""
    return Server(port, _Handler, name="webhook", tls=tls).start()


def _violations(raw: Raw | None) -> tuple[Violation, ...]:
    if not raw or "deletionTimestamp" in raw["metadata"]:
        return ()
    return check_spec(raw.get("spec"), InCluster.of(read_status(raw.get("status") or {}))).violations


class _Handler(Handler):
    def do_POST(self) -> None:
        """AdmissionReview in, AdmissionReview out; 400 for anything else."""
        if self.path.partition("?")[0] != PATH:
            return self.answer(404, f"POST {PATH}\n".encode())
        asked = self.read_body(_BODY_LIMIT)
        if asked is None:
            return None
        try:
            body = json.dumps(review(json.loads(asked))).encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return self.answer(400, b"expected an AdmissionReview\n")
        return self.answer(200, body, "application/json")

"""Admission webhook: refuse at `kubectl apply` what a schema cannot express, with the messages of the operator.

Every replica answers, leading or not. The webhook is optional: the operator makes the same checks itself. Any pod can
send it a request, so every part of a review is checked before it is used.
"""

import json
import logging
import ssl
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from internvl_api.memory.pod_settings import PodSettings
from internvl_api.memory.shortfall import shortfalls
from internvl_api.recipes.resolve import resolve
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.validation.check import Checked, check_spec
from internvl_api.validation.cluster import InCluster
from internvl_api.validation.defaults import RunDefaults
from internvl_api.validation.policy import Policy
from internvl_api.validation.violations import SpecError

from internvl_operator.core.network_profiles import NetworkProfile, required_gpus
from internvl_operator.core.network_use import unused_devices
from internvl_operator.core.run import read_status
from internvl_operator.http_server import Handler, Server
from internvl_operator.kube.client import ApiError

PATH = "/validate"
REVIEW_VERSION = "admission.k8s.io/v1"
_BODY_LIMIT = 8 * 2**20  # bytes; an object has at most 1.5 MB, and an update contains two
_UID_LIMIT = 256  # characters
_SHOWN = 80  # characters of a wrong value in a message

Raw = dict[str, Any]
logger = logging.getLogger(__name__)


class MalformedReview(ValueError):
    """The body is not an AdmissionReview; the message names the wrong part."""


class Request(NamedTuple):
    """The part of an AdmissionReview that is used: the run after and before the change; None where it has none."""

    uid: str
    new: Raw | None
    old: Raw | None


def read_request(body: bytes) -> Request:
    """The request of an AdmissionReview. Raises MalformedReview for any other bytes."""
    try:
        # Deep nesting raises RecursionError, a number of more than 4,300 digits ValueError.
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedReview(f"the body is not JSON that can be read ({type(error).__name__})") from None
    review = _object(asked, "the body")
    if review.get("apiVersion") != REVIEW_VERSION:
        raise MalformedReview(f"apiVersion: found {_short(review.get('apiVersion'))}, expected {REVIEW_VERSION}")
    request = _object(review.get("request"), "request")
    uid = request.get("uid")
    if not isinstance(uid, str) or len(uid) > _UID_LIMIT:
        raise MalformedReview(f"request.uid: found {_short(uid)}, expected a text of at most {_UID_LIMIT} characters")
    return Request(uid, _run(request, "object"), _run(request, "oldObject"))


class Known(NamedTuple):
    """What the checks know of the cluster.

    Attributes:
        gpu_memory: bytes of one GPU; None when unknown.
        defaults: gives the defaults of a namespace; raises ApiError when they cannot be read.
        cluster_defaults: those of the cluster, as YAML.
        profiles: the administrator's network profiles.
        settings: what pods get where the spec says nothing.
    """

    policy: Policy = Policy()
    gpu_memory: int | None = None
    defaults: Callable[[str], str] = lambda namespace: ""
    cluster_defaults: str = ""
    profiles: Mapping[str, NetworkProfile] = MappingProxyType({})
    settings: PodSettings = PodSettings()


NOTHING = Known()


def review(request: Request, known: Known = NOTHING) -> Raw:
    """The AdmissionReview with the answer."""
    response: Raw = {"uid": request.uid, "allowed": True}
    document = {"apiVersion": REVIEW_VERSION, "kind": "AdmissionReview", "response": response}
    if request.new is None or "deletionTimestamp" in request.new["metadata"]:
        return document
    try:
        defaults = _defaults(request.new["metadata"], known)
    except ApiError as error:  # the operator makes the same check as soon as it can read them
        logger.warning("a run is admitted without a check, because its namespace's defaults cannot be read: %s", error)
        return document
    # What was wrong before may still be suspended, labelled or deleted.
    before, now = _checked(request.old, known, defaults), _checked(request.new, known, defaults)
    if wrong := [each for each in now.violations if each not in before.violations]:
        response |= {"allowed": False, "status": {"code": 422, "reason": "Invalid", "message": str(SpecError(*wrong))}}
    elif warnings := _warnings(now.spec, known):
        response["warnings"] = warnings
    return document


def serve(port: int, tls: Callable[[], ssl.SSLContext], known: Known = NOTHING) -> Server:
    """Start answering; `tls` gives the context of each connection. Raises OSError."""

    class Reviews(Handler):
        def do_POST(self) -> None:
            _post(self, known)

    return Server(port, Reviews, name="webhook", tls=tls).start()


def answer(body: bytes, known: Known = NOTHING) -> tuple[int, str]:
    """HTTP status, and an AdmissionReview in JSON (200) or a message."""
    try:
        return 200, json.dumps(review(read_request(body), known))
    except MalformedReview as error:
        return 400, f"expected an AdmissionReview: {error}\n"
    except Exception:  # a bug: let the API server's failurePolicy decide
        logger.exception("cannot check a run at admission")
        return 500, "cannot check this run; the operator's log has the reason\n"


def _defaults(metadata: Raw, known: Known) -> RunDefaults:
    namespace, name = (str(metadata.get(key) or "-") for key in ("namespace", "name"))
    return RunDefaults(known.defaults(namespace), known.cluster_defaults, run=f"{namespace}/{name}")


def _checked(raw: Raw | None, known: Known, today: RunDefaults) -> Checked:
    if raw is None or "deletionTimestamp" in raw["metadata"]:
        return Checked(None, ())
    found = raw.get("status")
    given = found if isinstance(found, dict) else {}
    status = read_status({key: given[key] for key in ("checkpoint", "defaults") if key in given})
    defaults = today._replace(output=(status.defaults.output if status.defaults else None) or "")
    cluster = InCluster.of(status, known.policy, known.gpu_memory, defaults, required_gpus(known.profiles))
    return check_spec(raw.get("spec"), cluster)


def _warnings(spec: InternVLFineTuneSpec | None, known: Known) -> list[str]:
    """What kubectl shows of a run that is admitted: too small requests and limits, and devices that it cannot use."""
    if spec is None:
        return []
    unused = unused_devices(spec, spec.workers, known.profiles)
    return shortfalls(spec, resolve(spec, job="", job_uid=""), settings=known.settings) + ([unused] if unused else [])


def _run(request: Raw, name: str) -> Raw | None:
    if request.get(name) is None:
        return None
    raw = _object(request[name], f"request.{name}")
    _object(raw.get("metadata"), f"request.{name}.metadata")
    return raw


def _object(value: object, name: str) -> Raw:
    if not isinstance(value, dict):
        raise MalformedReview(f"{name}: found {_short(value)}, expected an object")
    return value


def _short(value: object) -> str:
    """A wrong value for messages, of bounded length and depth."""
    if value is None:
        return "nothing"
    return type(value).__name__ if isinstance(value, dict | list) else repr(value)[:_SHOWN]


def _post(handler: Handler, known: Known) -> None:
    """Answer an AdmissionReview with one; 400 for anything else."""
    if handler.path.partition("?")[0] != PATH:
        return handler.answer(404, f"POST {PATH}\n".encode())
    asked = handler.read_body(_BODY_LIMIT)
    if asked is None:
        return None
    status, text = answer(asked, known)
    return handler.answer(status, text.encode(), "application/json" if status == 200 else "text/plain; charset=utf-8")

"""Client of the API server: JSON in, JSON out, over one connection pool.

The official client finds and refreshes the credentials. Its generated models are not used, because building and
reading them costs more than the request.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode

import urllib3
from internvl_api.constants import GROUP, KIND, PLURAL, VERSION
from kubernetes import client, config

from internvl_operator import metrics

Raw = dict[str, Any]  # a JSON object
FIELD_MANAGER = "internvl-operator"
_APPLY = "application/apply-patch+yaml"  # JSON is YAML
_MERGE = "application/merge-patch+json"
_LONGEST_MESSAGE = 8192  # characters; status holds 32768, and others add to it
_UNDECLARED = re.compile(r"\.(\S+): field not declared in schema")
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
WATCH_MARGIN = 10.0  # seconds a watch may stay silent after the server should have ended it

logger = logging.getLogger(__name__)

# resource_of(object) -> (path of the API group, plural)
RESOURCES = {
    "Pod": ("/api/v1", "pods"),
    "Service": ("/api/v1", "services"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Event": ("/api/v1", "events"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
    "Secret": ("/api/v1", "secrets"),
    "ValidatingWebhookConfiguration": ("/apis/admissionregistration.k8s.io/v1", "validatingwebhookconfigurations"),
    KIND: (f"/apis/{GROUP}/{VERSION}", PLURAL),
    "PodGroup.scheduling.volcano.sh": ("/apis/scheduling.volcano.sh/v1beta1", "podgroups"),
    "PodGroup.scheduling.x-k8s.io": ("/apis/scheduling.x-k8s.io/v1alpha1", "podgroups"),
}


class ApiError(Exception):
    """A refusal by the server (`status`: HTTP status), or no answer (`status` 0)."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        message = message[:_LONGEST_MESSAGE]  # a webhook's denial has any length
        super().__init__(f"{status} {reason}: {message}")
        self.status, self.reason, self.message = status, reason, message

    @property
    def gone(self) -> bool:
        """The object or its namespace does not exist or is being deleted."""
        return self.status == 404 or (self.status == 403 and "being terminated" in self.message)

    @property
    def refused(self) -> bool:
        """The request itself is invalid or forbidden: an unchanged retry will fail too."""
        foreign = self.status == 409 and "Apply failed with" in self.message  # another manager owns a field
        return (self.status in (400, 403, 413, 422) or foreign) and not self.gone

    @property
    def undeclared(self) -> tuple[str, ...]:
        """The path of a field that the schema lacks: `("status", "stages", "attempt")`; else empty."""
        found = _UNDECLARED.search(self.message)
        return tuple(re.sub(r"\[[^]]*\]", "", found[1]).split(".")) if found else ()

    @property
    def unknown_kind(self) -> bool:
        """The CustomResourceDefinition of this kind is not installed."""
        return self.status == 404 and "could not find the requested resource" in self.message


class Api:
    """One API server. Safe to use from many threads."""

    def __init__(self, configuration: client.Configuration, *, timeout: float, connections: int) -> None:
        configuration.connection_pool_maxsize = connections
        self._configuration = configuration
        self._pool = client.ApiClient(configuration).rest_client.pool_manager
        self.timeout = timeout
        # Seconds for which writes are allowed: a replica that may have lost the Lease must not try.
        self.time_left: Callable[[], float] = lambda: float("inf")

    @classmethod
    def connect(cls, *, timeout: float, connections: int) -> "Api":
        """Connect with the pod's service account, else with KUBECONFIG. Raises kubernetes.config.ConfigException."""
        try:
            config.load_incluster_config()  # type: ignore[no-untyped-call]
        except config.ConfigException:
            config.load_kube_config()  # type: ignore[no-untyped-call]
        return cls(client.Configuration.get_default_copy(), timeout=timeout, connections=connections)

    def apply(self, obj: Raw, *, force: bool) -> Raw:
        """Server-side apply of a whole object. Without `force`, a field that another manager owns is a 409."""
        metadata = obj["metadata"]
        path = object_path(resource_of(obj), metadata.get("namespace"), metadata["name"])
        return self._write("apply", obj["kind"], "PATCH", path, obj, {"force": force})

    def replace(self, obj: Raw) -> Raw:
        """Replace a whole object that was read before; 409 when it has changed since."""
        metadata = obj["metadata"]
        path = object_path(resource_of(obj), metadata["namespace"], metadata["name"])
        return self._write("replace", obj["kind"], "PUT", path, obj)

    def apply_status(self, obj: Raw) -> Raw:
        """Server-side apply of `obj["status"]`; 404 when the object is deleted, 409 when its version differs."""
        metadata = obj["metadata"]
        path = object_path(obj["kind"], metadata["namespace"], metadata["name"]) + "/status"
        return self._write("status", obj["kind"], "PATCH", path, obj, {"force": True})

    def delete(self, kind: str, namespace: str, name: str, *, uid: str, force: bool, grace: int | None = None) -> Raw:
        """Delete the object if it has this uid (else 409); `force`: without a grace period; `grace`: seconds."""
        body: Raw = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        if force or grace is not None:
            body["gracePeriodSeconds"] = 0 if force else grace
        return self._write("delete", kind, "DELETE", object_path(kind, namespace, name), body)

    def patch(self, kind: str, namespace: str, name: str, patch: Raw) -> Raw:
        """Merge `patch` into an object; 409 when its uid or resourceVersion differs from the patch's."""
        return self._write("patch", kind, "PATCH", object_path(kind, namespace, name), patch, content=_MERGE)

    def create(self, obj: Raw, *, dry_run: bool = False) -> Raw:
        """Create an object; with `dry_run` the API server only says whether it would."""
        path = list_path(obj["kind"], obj["metadata"]["namespace"])
        return self._write("create", obj["kind"], "POST", path, obj, {"dryRun": "All"} if dry_run else None)

    def list_pages(self, path: str, *, selector: str = "", fields: str = "", page: int = 500) -> Iterator[Raw]:
        """The raw lists, page by page."""
        query = {"labelSelector": selector, "fieldSelector": fields, "limit": str(page)}
        while True:
            found = self._json("GET", path, query)
            yield found
            following = found["metadata"].get("continue")
            if not following:
                return
            query["continue"] = following

    def watch(self, path: str, *, selector: str, version: str, seconds: float, fields: str = "") -> Iterator[Raw]:
        """Raw watch events until the server ends the stream. A silent connection raises ApiError(0)."""
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "labelSelector": selector,
            "fieldSelector": fields,
            "resourceVersion": version,
            "timeoutSeconds": str(max(1, round(seconds))),
        }
        timeout = urllib3.Timeout(connect=self.timeout, read=seconds + WATCH_MARGIN)
        response = self._send("GET", path, query, None, timeout=timeout, stream=True)
        try:
            buffer = b""
            for chunk in response.stream(amt=None):
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    if line:
                        yield json.loads(line)
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(0, "Disconnected", str(error)) from error
        finally:
            response.close()

    def get(self, path: str, timeout: float | None = None) -> Raw:
        """Any document."""
        return self._json("GET", path, {}, timeout=timeout)

    def find(self, kind: str, namespace: str | None, name: str, timeout: float | None = None) -> Raw | None:
        """One object; None when it or its kind does not exist."""
        try:
            return self.get(object_path(kind, namespace, name), timeout)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def lease(self, method: str, path: str, body: Raw | None, timeout: float) -> Raw:
        """Read or write a Lease: the only write that needs no lead, because it acquires it."""
        return self._json(method, path, {}, body, timeout=timeout)

    def _write(
        self,
        verb: str,
        kind: str,
        method: str,
        path: str,
        body: Raw,
        options: Mapping[str, bool | str] | None = None,
        content: str | None = None,
    ) -> Raw:
        given = (options or {}).items()
        flags = {name: value if isinstance(value, str) else str(value).lower() for name, value in given}
        result = "error"
        try:
            if (left := self.time_left()) <= 0:
                raise ApiError(0, "NotLeading", "another replica may lead now")
            query = {"fieldManager": FIELD_MANAGER} | flags
            answer = self._json(method, path, query, body, content=content, timeout=min(self.timeout, left))
            result = "ok"
            return answer
        except ApiError as error:
            result = str(error.status)
            raise
        finally:
            metrics.API_WRITES.labels(verb, kind, result).inc()

    def _json(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: Raw | None = None,
        *,
        content: str | None = None,
        timeout: float | None = None,
    ) -> Raw:
        limit = urllib3.Timeout(total=timeout or self.timeout)
        response = self._send(method, path, query, body, timeout=limit, content=content)
        try:
            loaded = json.loads(response.data)
        except (ValueError, RecursionError) as error:  # a proxy's page, or an object nested too deep for Python
            raise ApiError(0, "Unreadable", f"the answer to {method} {path} is not JSON that can be read") from error
        if not isinstance(loaded, dict):
            raise ApiError(0, "Unreadable", f"the answer to {method} {path} is not a JSON object")
        return loaded

    def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: Raw | None,
        *,
        timeout: urllib3.Timeout,
        content: str | None = None,
        stream: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        url = f"{self._configuration.host}{path}?{urlencode({k: v for k, v in query.items() if v})}"
        headers = {"Accept": "application/json", "User-Agent": FIELD_MANAGER} | self._authorization()
        if body is not None:
            headers["Content-Type"] = content or (_APPLY if method == "PATCH" else "application/json")
        try:
            response = self._pool.request(
                method,
                url,
                body=None if body is None else encode(body),
                headers=headers,
                timeout=timeout,
                preload_content=not stream,
                retries=False,
            )
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(0, "Unreachable", str(error)) from error
        if response.status >= 400:
            raise _error(response)
        return response

    def _authorization(self) -> dict[str, str]:
        # On every request, because the client library renews a service account's token here.
        settings: Any = self._configuration.auth_settings()
        return {s["key"]: s["value"] for s in settings.values() if s["in"] == "header" and s["value"]}


def encode(body: Raw) -> bytes:
    """JSON that is also valid YAML, because the server parses applied objects as YAML.

    YAML has no escaped surrogate pairs, so characters such as emoji are written literally; unprintable characters are
    escaped.
    """
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text).encode()


def resource_of(obj: Raw) -> str:
    """The key in RESOURCES: an object's kind, with its group where several groups have that kind."""
    group, _, _ = obj["apiVersion"].rpartition("/")
    kind: str = obj["kind"]
    return kind if kind in RESOURCES else f"{kind}.{group}"


def list_path(kind: str, namespace: str | None) -> str:
    """The collection of a kind, in one namespace or (None) in all; None also for kinds without namespaces."""
    prefix, plural = RESOURCES[kind]
    return f"{prefix}/{plural}" if namespace is None else f"{prefix}/namespaces/{quote(namespace)}/{plural}"


def object_path(kind: str, namespace: str | None, name: str) -> str:
    """One object; its namespace is None for kinds without namespaces."""
    return f"{list_path(kind, namespace)}/{quote(name)}"


def _error(response: urllib3.BaseHTTPResponse) -> ApiError:
    try:
        status = json.loads(response.data)
        return ApiError(response.status, status.get("reason") or "", str(status.get("message") or ""))
    except (ValueError, AttributeError):
        return ApiError(response.status, response.reason or "", response.data[:200].decode(errors="replace"))

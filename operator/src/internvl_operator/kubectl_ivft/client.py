"""Access the API server with the user's kubeconfig and rights; errors name the next step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import urllib3
from internvl_api.constants import KIND, LABEL_JOB, LABEL_MANAGED_BY, MANAGED_BY, PLURAL
from internvl_api.validation.suggest import did_you_mean
from kubernetes import client, config

from internvl_operator.core.resources.names import queue_group, run_label
from internvl_operator.core.telemetry import printable
from internvl_operator.kube.client import Api, ApiError, list_path, object_path
from internvl_operator.kubectl_ivft.terminal import plain_object, plain_value

Raw = dict[str, Any]
MANAGER = "kubectl-ivft"
_TIMEOUT = 20.0  # seconds of one request
_KUEUE_VERSIONS = ("v1beta2", "v1beta1")  # newest first
_LONGEST_LINE = 1024 * 1024  # bytes of a log's line; a longer one comes in parts
_MERGE = "application/merge-patch+json"


class UserError(Exception):
    """An error message for the user, printed without a traceback."""


class Unreachable(UserError):
    """The API server does not answer."""


@dataclass(frozen=True)
class Place:
    """Cluster and namespace, as given by kubectl's flags."""

    kubeconfig: str | None = None
    context: str | None = None
    namespace: str | None = None


class Runs:
    """InternVLFineTunes with their pods and logs. Raises UserError."""

    def __init__(self, configuration: client.Configuration, namespace: str) -> None:
        self.namespace, self._host = namespace, configuration.host
        self._api = _UserApi(configuration, timeout=_TIMEOUT, connections=4)

    @classmethod
    def connect(cls, place: Place) -> "Runs":
        """Connect as kubectl does: by the flags, else KUBECONFIG or ~/.kube/config, else the pod's service account."""
        configuration = client.Configuration()
        try:
            config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=place.kubeconfig, context=place.context, client_configuration=configuration
            )
            default: str | None = _context_namespace(place)
        except config.ConfigException as error:
            default = _in_pod(configuration, place)
            if default is None:
                text = f"no cluster configured: {error}\nSet KUBECONFIG, or give --kubeconfig and --context."
                raise UserError(text) from error
        return cls(configuration, place.namespace or default or "default")

    def get(self, name: str) -> Raw:
        """One run; the error for an unknown name suggests a similar one."""
        try:
            return plain_object(self._api.get(object_path(KIND, self.namespace, name)))
        except ApiError as error:
            if error.status == 404 and f'"{name}"' in error.message:
                raise UserError(self._absent(name)) from error
            raise self._explained(error, f"read the run {name!r}") from error

    def all(self, *, everywhere: bool = False) -> list[Raw]:
        """Every run of the namespace, or of all namespaces."""
        try:
            pages = self._api.list_pages(list_path(KIND, None if everywhere else self.namespace))
            return [plain_object(raw) for page in pages for raw in page["items"]]
        except ApiError as error:
            hint = "\nYou may have rights in one namespace: omit -A, or give -n." if everywhere else ""
            raise self._explained(error, "list runs", hint) from error

    def pods(self, name: str) -> list[Raw]:
        """The run's pods."""
        selector = f"{LABEL_MANAGED_BY}={MANAGED_BY},{LABEL_JOB}={run_label(name)}"
        try:
            pages = self._api.list_pages(list_path("Pod", self.namespace), selector=selector)
            return [plain_object(raw) for page in pages for raw in page["items"]]
        except ApiError as error:
            raise self._explained(error, "list pods") from error

    def events(self) -> list[Raw]:
        """Every event of the namespace."""
        try:
            pages = self._api.list_pages(list_path("Event", self.namespace))
            return [plain_value(raw) for page in pages for raw in page["items"]]
        except ApiError as error:
            raise self._explained(error, "list events") from error

    def queue_reason(self, name: str, stage: str, attempt: int) -> str:
        """Kueue's message why it does not admit this attempt; empty without one or without the right to read it."""
        for version in _KUEUE_VERSIONS:
            path = f"/apis/kueue.x-k8s.io/{version}/namespaces/{quote(self.namespace)}/workloads"
            try:
                workload = self._api.get(f"{path}/{quote(queue_group(name, stage, attempt))}")
            except ApiError:
                continue
            conditions = (workload.get("status") or {}).get("conditions") or []
            held = [each for each in conditions if (each["type"], each["status"]) == ("QuotaReserved", "False")]
            return printable(str(held[0].get("message", ""))) if held else ""
        return ""

    def set_suspended(self, name: str, suspended: bool) -> Raw:
        """Set spec.runPolicy.suspend."""
        change = {"spec": {"runPolicy": {"suspend": suspended}}}
        try:
            return self._api.merge(object_path(KIND, self.namespace, name), change)
        except ApiError as error:
            raise self._explained(error, f"change the run {name!r}") from error

    def log(self, pod: str, *, container: str, follow: bool, tail: int | None) -> Iterator[bytes]:
        """A container's log, line by line. Raises NotStarted while the container has none."""
        query = {"container": container, "follow": str(follow).lower(), "tailLines": "" if tail is None else str(tail)}
        try:
            yield from self._api.lines(f"{object_path('Pod', self.namespace, pod)}/log", query)
        except ApiError as error:
            if error.status in (400, 404):  # "container … is waiting to start: ContainerCreating"; or deleted
                raise NotStarted(error.message) from error
            raise self._explained(error, f"read the log of pod {pod!r}") from error

    def _absent(self, name: str) -> str:
        text = f"no run {name!r} in namespace {self.namespace!r}"
        try:
            known = [raw["metadata"]["name"] for raw in self.all()]
        except UserError:
            return text
        if hint := did_you_mean(name, known):
            return text + hint
        listed = f"; existing runs: {', '.join(sorted(known)[:8])}" if known else "; the namespace has no runs"
        return f"{text}{listed}\nTry -n NAMESPACE, or `kubectl ivft list -A`."

    def _explained(self, error: ApiError, what: str, hint: str = "") -> UserError:
        if error.status == 0:
            return Unreachable(f"the API server at {self._host} does not answer: {error.message}")
        if error.status == 401:
            return UserError(
                f"{self._host} does not accept your credentials: log in again, or choose another --context"
            )
        if error.status == 403:
            return UserError(f"you may not {what} in this cluster: {error.message}{hint}")
        if error.status == 404 and '"' not in error.message:  # for a missing object, the message quotes its name
            return UserError(f"{self._host} does not serve {PLURAL}: its CRD is not installed; see docs/install.md")
        return UserError(f"cannot {what}: {error.message or error}")


class NotStarted(Exception):
    """The container has not started, so it has no log."""


class _UserApi(Api):
    def merge(self, path: str, change: Raw) -> Raw:
        """A JSON merge patch."""
        return self._json("PATCH", path, {"fieldManager": MANAGER}, change, content=_MERGE)

    def lines(self, path: str, query: dict[str, str]) -> Iterator[bytes]:
        """The lines of a response without an end."""
        timeout = urllib3.Timeout(connect=self.timeout, read=None)
        response = self._send("GET", path, query, None, timeout=timeout, stream=True)
        try:
            rest = b""
            for chunk in response.stream(amt=None):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from lines
                if len(rest) > _LONGEST_LINE:
                    yield rest
                    rest = b""
            if rest:
                yield rest
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(0, "Disconnected", str(error)) from error
        finally:
            response.close()


def _context_namespace(place: Place) -> str:
    contexts, active = config.list_kube_config_contexts(config_file=place.kubeconfig)  # type: ignore[no-untyped-call]
    chosen = next((each for each in contexts if each["name"] == place.context), active)
    return str(chosen["context"].get("namespace") or "default")


def _in_pod(configuration: client.Configuration, place: Place) -> str | None:
    """The namespace of the pod that this process runs in; None outside a pod, or when the user named a cluster."""
    if place.kubeconfig or place.context:
        return None
    try:
        config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        with open("/var/run/secrets/kubernetes.io/serviceaccount/namespace", encoding="utf-8") as file:
            return file.read().strip()
    except (config.ConfigException, OSError):
        return None

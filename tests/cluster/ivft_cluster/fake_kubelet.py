"""A fake scheduler and kubelet for pods of an `ApiServer`: schedules, runs and ends them as a test specifies.

with FakeKubelet(api_server.api) as kubelet:
    …                                                  # the operator creates pods; they become Running
    kubelet.finish("ns", "demo-train-0-1", exit_code=65, message='{"reason": "BadData"}')
"""

from __future__ import annotations

import datetime
import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kubernetes import client, watch
from kubernetes.client.exceptions import ApiException

from ivft_cluster.shell import wait_for

# The pod changed or disappeared, or its namespace is being deleted, while this thread acted on an older state.
OVERTAKEN = (403, 404, 409)
NODE_CAPACITY = {"cpu": "64", "memory": "512Gi", "pods": "500", "nvidia.com/gpu": "8"}


@dataclass(frozen=True)
class Run:
    """Becomes Running and Ready, and stays so until `finish`."""


@dataclass(frozen=True)
class Exit:
    """Runs, then ends with this code and termination message."""

    exit_code: int = 0
    message: str = ""
    reason: str | None = None


@dataclass(frozen=True)
class Unschedulable:
    """Stays Pending with PodScheduled=False."""

    message: str = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."


@dataclass(frozen=True)
class Waiting:
    """Is placed on a node but its containers do not start: ImagePullBackOff, CreateContainerConfigError, …"""

    reason: str = "ImagePullBackOff"
    message: str = "Back-off pulling image"


Behaviour = Run | Exit | Unschedulable | Waiting


def run_all(pod: Any) -> Behaviour:
    return Run()


class FakeKubelet:
    """A thread that gives each pod the fate that `behaviour(pod)` returns, in order of arrival, until it is closed.

    One that was never opened does nothing by itself: each pod waits for its `start`, `finish` or `evict`.
    Pods get addresses of 127.64.0.0/10: all of them are this machine, so a test can serve a pod's port itself.
    """

    def __init__(
        self,
        api: client.ApiClient,
        nodes: tuple[str, ...] = ("fake-1", "fake-2"),
        capacity: Mapping[str, str] = NODE_CAPACITY,
        behaviour: Callable[[Any], Behaviour] = run_all,
    ) -> None:
        self.core: Any = client.CoreV1Api(api)
        self.nodes = nodes
        self.capacity = dict(capacity)
        self.behaviour = behaviour
        self._placed = itertools.cycle(nodes)
        self._numbers = itertools.count(1)
        self._stop = threading.Event()
        self._acting = threading.Lock()
        self._thread = threading.Thread(target=self._follow, name="fake-kubelet", daemon=True)
        self._met: set[str] = set()
        self.errors: list[Exception] = []

    def __enter__(self) -> FakeKubelet:
        for name in self.nodes:
            self._register(name)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._acting:  # the thread leaves at its next event; it acts on none from here on
            self._stop.set()
        for name in self.nodes:
            self.core.delete_node(name)
        if self.errors and exc[0] is None:
            raise self.errors[0]

    # --- what tests call

    def finish(
        self, namespace: str, name: str, exit_code: int = 0, message: str = "", reason: str | None = None
    ) -> None:
        """End every container of a pod; its phase becomes Succeeded for code 0, else Failed."""
        self._end(self.core.read_namespaced_pod(name, namespace), Exit(exit_code, message, reason))

    def evict(
        self, namespace: str, name: str, reason: str = "Evicted", message: str = "The node was low on memory."
    ) -> None:
        """Fail a pod like a node that runs out of a resource: a reason on the pod, no exit code."""
        self._patch(
            self.core.read_namespaced_pod(name, namespace),
            {"phase": "Failed", "reason": reason, "message": message},
        )

    def start(self, namespace: str, name: str) -> None:
        """Let a pod run that `Unschedulable` or `Waiting` held back."""
        pod = self.core.read_namespaced_pod(name, namespace)
        self._bind(pod)
        self._run(self.core.read_namespaced_pod(name, namespace))

    def wait_phase(self, namespace: str, name: str, phase: str = "Running", timeout: float = 30) -> Any:
        """The pod, once it exists and has this phase. Raises HarnessError."""

        def look() -> Any:
            pod = self.core.read_namespaced_pod(name, namespace)
            return pod if pod.status.phase == phase else None

        return wait_for(f"pod {namespace}/{name} is {phase}", look, timeout=timeout)

    # --- the loop

    def _follow(self) -> None:
        seen: dict[str, str] = {}  # where the next watch goes on; empty: it begins with every pod there is
        while not self._stop.is_set():
            stream = watch.Watch().stream  # type: ignore[no-untyped-call]
            try:
                for event in stream(self.core.list_pod_for_all_namespaces, timeout_seconds=1, **seen):  # type: ignore[no-untyped-call]
                    if event["type"] in ("ADDED", "MODIFIED"):
                        self._try_to_advance(event["object"])
                    seen = {"resource_version": event["object"].metadata.resource_version}
            except Exception:  # noqa: BLE001 - the API server may be restarted under us
                seen = {}
                self._stop.wait(0.2)

    def _try_to_advance(self, pod: Any) -> None:
        try:
            with self._acting:
                if not self._stop.is_set():
                    self._advance(pod)
        except ApiException as error:
            if error.status not in OVERTAKEN:
                self.errors.append(error)

    def _advance(self, pod: Any) -> None:
        """Act on each pod once: later events, caused by this thread's own steps, show older states."""
        if pod.metadata.deletion_timestamp:
            self._delete(pod)
        elif pod.metadata.uid not in self._met and pod.status.phase == "Pending" and not pod.status.container_statuses:
            self._met.add(pod.metadata.uid)
            match self.behaviour(pod):
                case Unschedulable() as fate:
                    self._refuse(pod, fate)
                case Waiting() as fate:
                    self._bind(pod)
                    self._hold(pod, fate)
                case Exit() as fate:
                    self._bind(pod)
                    self._run(pod)
                    self._end(pod, fate)
                case Run():
                    self._bind(pod)
                    self._run(pod)

    def _register(self, name: str) -> None:
        now = _now()
        ready = {
            "type": "Ready",
            "status": "True",
            "reason": "KubeletReady",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }
        self.core.create_node({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}})
        status = {"capacity": self.capacity, "allocatable": self.capacity, "conditions": [ready]}
        self.core.patch_node_status(name, {"status": status})
        self.core.patch_node(name, {"spec": {"taints": None}})

    def _bind(self, pod: Any) -> None:
        if pod.spec.node_name:
            return
        target = {"apiVersion": "v1", "kind": "Node", "name": next(self._placed)}
        body = {"metadata": {"name": pod.metadata.name}, "target": target}
        self.core.create_namespaced_pod_binding(pod.metadata.name, pod.metadata.namespace, body, _preload_content=False)

    def _refuse(self, pod: Any, fate: Unschedulable) -> None:
        self._patch(pod, {"conditions": [_condition("PodScheduled", "False", "Unschedulable", fate.message)]})

    def _hold(self, pod: Any, fate: Waiting) -> None:
        state = {"waiting": {"reason": fate.reason, "message": fate.message}}
        self._patch(pod, {"containerStatuses": _containers(pod, state, ready=False)})

    def _run(self, pod: Any) -> None:
        number = next(self._numbers)
        address = f"127.{64 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}"
        self._patch(
            pod,
            {
                "phase": "Running",
                "podIP": address,
                "podIPs": [{"ip": address}],
                "startTime": _now(),
                "conditions": [_condition(kind, "True") for kind in ("PodScheduled", "Initialized", "Ready")],
                "containerStatuses": _containers(pod, {"running": {"startedAt": _now()}}, ready=True),
            },
        )

    def _end(self, pod: Any, fate: Exit) -> None:
        terminated = {
            "exitCode": fate.exit_code,
            "reason": fate.reason or ("Error" if fate.exit_code else "Completed"),
            "message": fate.message,
            "startedAt": _now(),
            "finishedAt": _now(),
        }
        statuses = _containers(pod, {"running": None, "waiting": None, "terminated": terminated}, ready=False)
        phase = "Failed" if fate.exit_code else "Succeeded"
        self._patch(pod, {"phase": phase, "conditions": [_condition("Ready", "False")], "containerStatuses": statuses})

    def _delete(self, pod: Any) -> None:
        try:
            self.core.delete_namespaced_pod(
                pod.metadata.name,
                pod.metadata.namespace,
                body=client.V1DeleteOptions(
                    grace_period_seconds=0, preconditions=client.V1Preconditions(uid=pod.metadata.uid)
                ),
            )
        except ApiException as error:
            if error.status not in (404, 409):
                raise

    def _patch(self, pod: Any, status: Mapping[str, Any]) -> None:
        self.core.patch_namespaced_pod_status(pod.metadata.name, pod.metadata.namespace, {"status": status})


def _containers(pod: Any, state: Mapping[str, Any], *, ready: bool) -> list[dict[str, Any]]:
    return [
        {
            "name": container.name,
            "image": container.image,
            "imageID": "",
            "ready": ready,
            "started": ready,
            "restartCount": 0,
            "state": state,
        }
        for container in pod.spec.containers
    ]


def _condition(kind: str, status: str, reason: str = "", message: str = "") -> dict[str, str]:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": _now()}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

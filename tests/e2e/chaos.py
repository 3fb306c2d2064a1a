"""Executes a chaos plan on the real cluster, some runs at a time, and records the result of each run."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from e2e import chaos_plan
from e2e.chaos_plan import EVERY_STEPS, RENDEZVOUS, STEPS, Kind, Planned
from e2e.chaos_verdict import Ending, Product
from e2e.harness import NAMESPACE, Platform, processes
from internvl_api.constants import GROUP, LABEL_JOB, PLURAL, VERSION
from internvl_api.status import InternVLFineTuneStatus
from ivft_cluster.shell import console, wait_for
from ivft_demo.data import BUCKET
from ivft_demo.follow import read_status
from ivft_demo.results import list_keys, losses, verify_manifest
from kubernetes import client, watch
from urllib3.exceptions import HTTPError

IN_FLIGHT = 4  # runs at a time; more would compete for two cores
OUTAGE_SECONDS = 30  # of object storage
CUT_SECONDS = 20
RUN_SECONDS = 1800
KEPT_CHECKPOINTS = 2


@dataclass
class Told:
    """Result of one run; `landed`: whether the disturbance found something to disturb."""

    planned: Planned | None
    output: str
    began: float
    ended: float = 0.0
    landed: bool = False
    status: InternVLFineTuneStatus = field(default_factory=InternVLFineTuneStatus)


@dataclass(frozen=True)
class _Struck:
    run: str
    kind: Kind
    began: float
    ended: float


class ReasonLog:
    """Reason for the end of each attempt of each run, read from its conditions at that moment."""

    def __init__(self, platform: Platform) -> None:
        self.reasons: dict[str, list[str]] = defaultdict(list)
        self._attempts: dict[str, int] = {}
        self._custom, self._stop = platform.custom, threading.Event()
        threading.Thread(target=self._follow, name="reasons", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _follow(self) -> None:
        place = {"group": GROUP, "version": VERSION, "namespace": NAMESPACE, "plural": PLURAL}
        while not self._stop.is_set():
            with contextlib.suppress(HTTPError, client.ApiException):  # the API server is away
                listing = self._custom.list_namespaced_custom_object
                for event in watch.Watch().stream(listing, **place, timeout_seconds=60):
                    self._note(event["object"]["metadata"]["name"], read_status(event["object"]))
            self._stop.wait(0.2)

    def _note(self, name: str, status: InternVLFineTuneStatus) -> None:
        if status.attempt > self._attempts.get(name, 1):
            ready = [c for c in status.conditions if c.type == "Ready"]
            self.reasons[name] += [c.reason for c in ready]
            for condition in ready:
                console.print(f"{name}: attempt {status.attempt - 1} ended: {condition.reason}: {condition.message}")
        self._attempts[name] = max(status.attempt, self._attempts.get(name, 1))


class Chaos:
    """One session of disturbances."""

    def __init__(self, platform: Platform) -> None:
        self._platform, self._cluster = platform, platform.cluster
        self.log = ReasonLog(platform)
        self.told: dict[str, Told] = {}
        self._struck: list[_Struck] = []
        self._turn = threading.Lock()  # one cluster disturbance at a time, so that effects can be attributed
        self._strikes: dict[Kind, Callable[[Planned], bool]] = {
            chaos_plan.WORKER_DELETED: self._delete_worker,
            chaos_plan.TRAINER_KILLED: self._kill_trainer,
            chaos_plan.NODE_RESTARTED: self._restart_node,
            chaos_plan.NODE_LOST: self._lose_node,
            chaos_plan.NODES_CUT: self._cut_nodes,
            chaos_plan.STORAGE_STOPPED: self._stop_storage,
            chaos_plan.API_SERVER_RESTARTED: self._restart_api_server,
            chaos_plan.OPERATOR_KILLED: self._kill_operator,
        }

    def run_all(self, plan: list[Planned]) -> None:
        """Run every run to its end. Raises the first error of a disturbance itself."""
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            for _ in pool.map(self._run, plan):
                pass

    def run_undisturbed(self, name: str) -> None:
        """The undisturbed reference run."""
        self.told[name] = self._begin(name, None)
        self._end(name)

    def ending(self, name: str) -> Ending:
        told = self.told[name]
        return Ending(told.status, self.log.reasons[name], self._kinds(name, told))

    def product(self, name: str) -> Product:
        """Published files of a run, read back and compared with its manifest."""
        output, s3 = self.told[name].output, self._platform.s3
        files = verify_manifest(s3, f"{output}/artifacts")
        keys = list_keys(s3, f"{output}/checkpoints")
        folders = {key.partition("/")[0] for key in keys}
        return Product(
            losses(s3, output),
            {file.path: file.sha256 for file in files if file.path.startswith("adapter/")},
            {folder: f"{folder}/manifest.json" in keys for folder in folders},
        )

    def _run(self, planned: Planned) -> None:
        told = self.told[planned.run] = self._begin(planned.run, planned)
        self._platform.wait(planned.run, planned.moment, lambda status: has_come(planned, status), RUN_SECONDS)
        with self._turn if planned.kind.hits_all else contextlib.nullcontext():
            console.print(f"{planned.kind.title}: at {planned.moment} of {planned.run}")
            began = time.monotonic()
            told.landed = self._strikes[planned.kind](planned)
            if told.landed:
                self._struck.append(_Struck(planned.run, planned.kind, began, time.monotonic()))
        self._end(planned.run)

    def _begin(self, name: str, planned: Planned | None) -> Told:
        with self._turn:  # needs a running API server
            output = self._platform.apply(
                "quickstart",
                name,
                training={"maxSteps": STEPS, "epochs": 20},
                checkpoint={"everySteps": EVERY_STEPS, "keep": KEPT_CHECKPOINTS},
                podTemplate=pod_template(name),
            )
        return Told(planned, output, time.monotonic())

    def _end(self, name: str) -> None:
        told = self.told[name]
        told.status = self._platform.wait(name, "finished", lambda s: s.phase in ("Succeeded", "Failed"), RUN_SECONDS)
        told.ended = time.monotonic()
        console.print(f"{name}: {told.status.phase} after {told.ended - told.began:.0f} s: {self.log.reasons[name]}")

    def _kinds(self, name: str, told: Told) -> list[Kind]:
        """Kinds of the disturbances that affected a run."""
        return [
            struck.kind
            for struck in self._struck
            if struck.run == name or (struck.kind.hits_all and struck.began < told.ended and told.began < struck.ended)
        ]

    # --- disturbances: each returns whether it found something to disturb, after the cluster has recovered

    def _delete_worker(self, planned: Planned) -> bool:
        pod = self._pod(planned)
        if pod.status.phase != "Running":
            return False
        name = pod.metadata.name
        wait_for(f"{name} is deleted", lambda: self._delete(name, pod.metadata.uid), timeout=120, every=0.2)
        return True

    def _delete(self, name: str, uid: str) -> bool:
        body = client.V1DeleteOptions(grace_period_seconds=0, preconditions=client.V1Preconditions(uid=uid))
        try:
            self._platform.core.delete_namespaced_pod(name, NAMESPACE, body=body)
        except client.ApiException as error:
            if error.status not in (404, 409):  # already deleted by a request whose answer was lost
                raise
        return True

    def _kill_trainer(self, planned: Planned) -> bool:
        victims = processes(f"pod{self._pod(planned).metadata.uid}", "trainer")
        if not victims:
            return False
        victims[-1].kill()  # the training process, not its launcher
        return True

    def _restart_node(self, planned: Planned) -> bool:
        node = self._pod(planned).spec.node_name
        self._cluster.kill_node(node)
        self._cluster.start_node(node)
        self._wait_whole(node)
        return True

    def _lose_node(self, planned: Planned) -> bool:
        node = self._pod(planned).spec.node_name
        self._cluster.kill_node(node)
        try:
            wait_for(f"{node} is missed", lambda: not self._ready(node), timeout=180, every=0.5)
        finally:
            self._cluster.start_node(node)
        self._wait_whole(node)
        return True

    def _cut_nodes(self, _planned: Planned) -> bool:
        self._cluster.cut("node1", "node2")
        time.sleep(CUT_SECONDS)
        self._cluster.heal("node1", "node2")
        return True

    def _stop_storage(self, _planned: Planned) -> bool:
        self._cluster.s3.stop()
        time.sleep(OUTAGE_SECONDS)
        self._cluster.s3.start()
        self._cluster.s3.wait_ready()
        return True

    def _restart_api_server(self, _planned: Planned) -> bool:
        self._cluster.restart_apiserver()
        return True

    def _kill_operator(self, _planned: Planned) -> bool:
        self._platform.kill_operator()
        return True

    def _pod(self, planned: Planned) -> Any:
        name = f"{planned.run}-{planned.stage}-{planned.rank}"
        return wait_for(f"pod {name}", lambda: self._platform.core.read_namespaced_pod(name, NAMESPACE), timeout=120)

    def _ready(self, node: str) -> bool:
        conditions = self._platform.core.read_node(node).status.conditions
        return any((c.type, c.status) == ("Ready", "True") for c in conditions)

    def _wait_whole(self, node: str) -> None:
        """Wait until a node's kubelet reports again and its operator pods are back."""
        before = self._lease(node)
        wait_for(f"{node} reports again", lambda: self._lease(node) > before, timeout=180, every=0.5)
        self._cluster.wait_nodes_ready(timeout=180)

    def _lease(self, node: str) -> Any:
        return (
            client.CoordinationV1Api(self._cluster.api).read_namespaced_lease(node, "kube-node-lease").spec.renew_time
        )


def pod_template(name: str) -> dict[str, Any]:
    """Spread workers over both nodes if both are up. Requests are small: the machine has few cores."""
    apart = {"labelSelector": {"matchLabels": {LABEL_JOB: name}}, "topologyKey": "kubernetes.io/hostname"}
    return {
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": apart}]
            }
        },
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
        "terminationGracePeriodSeconds": 10,
    }


def has_come(planned: Planned, status: InternVLFineTuneStatus) -> bool:
    """Whether a run has reached (or passed) the moment of its disturbance."""
    if status.phase in ("Succeeded", "Failed"):
        return True
    if status.stage != planned.stage or status.phase != "Running":
        return status.stage == "publish" and planned.stage == "train"
    reached = status.progress.step if status.progress else None
    return planned.step == RENDEZVOUS or planned.stage == "publish" or (reached or 0) >= planned.step


def unfinished_uploads(platform: Platform) -> list[str]:
    """Keys of multipart uploads that were neither completed nor aborted."""
    return [each["Key"] for each in platform.s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]

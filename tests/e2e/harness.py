"""User actions for the end-to-end tests, and a recorder of every child that ever existed."""

from __future__ import annotations

import contextlib
import copy
import signal
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml
from internvl_api.constants import GROUP, LABEL_JOB, LABEL_MANAGED_BY, MANAGED_BY, PLURAL, VERSION
from internvl_api.status import InternVLFineTuneStatus
from ivft_cluster import daemons
from ivft_cluster.cluster import Cluster
from ivft_cluster.shell import wait_for
from ivft_demo.checkpoint import OUTPUT_LAYER, write_checkpoint
from ivft_demo.data import BUCKET, EXAMPLES
from ivft_demo.follow import changes, follow, read_status
from ivft_demo.results import Loss
from kubernetes import client, watch
from safetensors.numpy import load_file, save_file
from urllib3.exceptions import HTTPError

NAMESPACE = "default"
RUN_SECONDS = 600
# enough steps to break something between the first checkpoint and the end
STEPS = {"maxSteps": 120, "epochs": 40}
CHECKPOINT = {"everySteps": 40}
LONG_STEPS = {"maxSteps": 400, "epochs": 100}  # some forty seconds: to remove a node or to preempt a run takes seconds


def trains(status: InternVLFineTuneStatus) -> bool:
    """Whether all workers of this attempt train; until it reports, status shows the earlier attempt's progress."""
    detail = status.progress.detail if status.progress and status.progress_at else None
    return (status.stage, status.phase, detail) == ("train", "Running", "training")


def condition(status: InternVLFineTuneStatus, kind: str) -> str:
    """Message of a condition that is True; empty when there is none."""
    return next((each.message for each in status.conditions if (each.type, each.status) == (kind, "True")), "")


def stalled(status: InternVLFineTuneStatus) -> str:
    """The reason of the condition Stalled, while it is True; else empty."""
    found = [each.reason for each in status.conditions if (each.type, each.status) == ("Stalled", "True")]
    return found[0] if found else ""


def assert_same_losses(curve: list[Loss], expected: list[Loss]) -> None:
    """Assert the same steps, each once and in order, with losses within 1e-6."""
    assert [each.step for each in curve] == [each.step for each in expected]
    assert max(abs(one.loss - other.loss) for one, other in zip(curve, expected, strict=True)) <= 1e-6


class Finished(NamedTuple):
    """A run that succeeded."""

    status: InternVLFineTuneStatus
    output: str
    curve: list[Loss]


class Platform:
    """A user's access to one namespace: kubectl-like calls, object storage, and runs created from the examples."""

    def __init__(self, cluster: Cluster, namespace: str = NAMESPACE) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.api = cluster.api
        self.core: Any = client.CoreV1Api(self.api)
        self.custom: Any = client.CustomObjectsApi(self.api)
        self.s3 = cluster.s3.client()

    def kubectl_ivft(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the plugin as a user does."""
        place = ["-n", self.namespace, "--kubeconfig", str(self.cluster.kubeconfig)]
        command = [sys.executable, "-m", "internvl_operator.kubectl_ivft", *words, *place]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=RUN_SECONDS)

    def apply(self, example: str, name: str, *, annotations: dict[str, str] | None = None, **spec: Any) -> str:
        """Create a run from an example with its own name and output, and `spec` merged over it; return the output."""
        resource = yaml.safe_load((EXAMPLES / f"{example}.yaml").read_text())
        resource["metadata"] |= {"name": name, "annotations": annotations or {}}
        resource["spec"]["output"] = f"s3://{BUCKET}/runs/{name}"
        for field, value in spec.items():
            below = resource["spec"].get(field)
            both = isinstance(below, dict) and isinstance(value, dict)
            resource["spec"][field] = {**copy.deepcopy(below), **value} if both else value
        self.custom.create_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, resource)
        return str(resource["spec"]["output"])

    def follow(self, name: str) -> InternVLFineTuneStatus:
        """Wait until a run succeeds. Raises RunProblem when it does not."""
        return follow(self.api, name, self.namespace, timeout=RUN_SECONDS)

    def change(self, name: str, **spec: Any) -> int:
        """Merge `spec` into a run's, as `kubectl patch --type merge` does; return the new generation."""
        place = (GROUP, VERSION, self.namespace, PLURAL, name)
        return int(self.custom.patch_namespaced_custom_object(*place, {"spec": spec})["metadata"]["generation"])

    def wait(self, name: str, what: str, condition: Any, timeout: float = RUN_SECONDS) -> InternVLFineTuneStatus:
        """Wait until `condition(status)` holds and return the status; `what` names it in the error message."""
        return read_status(self.wait_resource(name, what, condition, timeout))

    def wait_resource(self, name: str, what: str, condition: Any, timeout: float = RUN_SECONDS) -> dict[str, Any]:
        """The same, but returns the whole resource."""
        seen = None
        try:
            for resource in changes(self.api, name, self.namespace, timeout=timeout):
                seen = read_status(resource)
                if condition(seen):
                    return resource
        except RuntimeError as error:
            raise AssertionError(f"{name}: not {what}: {error}; last status {seen}") from error
        raise AssertionError("unreachable")

    def wait_checkpoint(self, output: str, step: int) -> None:
        """Wait until the folder `output` of the bucket has a complete checkpoint of that step, of any attempt."""
        prefix = f"{output}/checkpoints/step-{step:08d}"

        def is_complete() -> bool:
            found = self.s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
            return any(item["Key"].endswith("/manifest.json") for item in found)

        wait_for(f"checkpoint {prefix}", is_complete, timeout=RUN_SECONDS, every=0.1)

    def forget(self, name: str) -> None:
        """Delete a run; the garbage collector deletes its children later."""
        self.custom.delete_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name)

    def delete(self, name: str) -> None:
        """Delete a run and wait until its children are gone."""
        self.forget(name)
        wait_for(f"the children of {name} are gone", lambda: not self.children(name), timeout=120)

    def delete_all(self) -> None:
        """Delete every run, so that no pod outlives the tests."""
        for resource in self.custom.list_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL)["items"]:
            self.delete(resource["metadata"]["name"])

    def children(self, name: str) -> list[str]:
        """Pods, Services and ConfigMaps that the operator created for a run."""
        lists = (
            self.core.list_namespaced_pod,
            self.core.list_namespaced_service,
            self.core.list_namespaced_config_map,
        )
        selector = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
        return [
            item.metadata.name
            for listing in lists
            for item in listing(self.namespace, label_selector=selector).items
            if any(owner.name == name for owner in item.metadata.owner_references or ())
        ]

    def pods(self, name: str, **labels: str) -> list[Any]:
        """A run's pods; `labels` by the last part of their names, such as stage="train"."""
        wanted = {LABEL_JOB: name} | {f"{GROUP}/{label}": value for label, value in labels.items()}
        selector = ",".join(f"{label}={value}" for label, value in wanted.items())
        return list(self.core.list_namespaced_pod(self.namespace, label_selector=selector).items)

    def signal_worker(self, pod: str, number: signal.Signals) -> None:
        """Signal the training process of a pod (not its launcher) as soon as it exists."""
        uid = self.core.read_namespaced_pod(pod, self.namespace).metadata.uid
        found = wait_for(
            f"a training process in {pod}",
            lambda: processes(f"pod{uid}", "-m internvl_trainer train"),
        )
        found[0].send_signal(number)

    def events(self, name: str) -> list[str]:
        """The Events of a run, each `reason: message`."""
        field = f"involvedObject.name={name}"
        found = self.core.list_namespaced_event(self.namespace, field_selector=field).items
        return [f"{event.reason}: {event.message}" for event in found]

    def upload_poisoned_checkpoint(self, key: str) -> None:
        """A checkpoint whose logits overflow, so that training gets no finite loss."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_checkpoint(Path(scratch) / "model")
            weights = load_file(folder / "model.safetensors")
            weights[OUTPUT_LAYER] = weights[OUTPUT_LAYER] * 0 + 3e38
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            for path in folder.iterdir():
                self.s3.upload_file(str(path), BUCKET, f"{key}/{path.name}")

    def kill_operator(self) -> None:
        """Send SIGKILL to this cluster's operator processes; the kubelet restarts them."""
        victims = processes(f"ivft-{self.cluster.id}-", "bin/internvl-operator")
        assert victims, "the operator does not run"
        for process in victims:
            process.kill()


def processes(group: str, command: str) -> list[psutil.Process]:
    """Processes whose cgroup name contains one text (a pod's uid, a cluster's id) and command another; oldest first."""
    found = []
    for process in daemons.everyone():
        with contextlib.suppress(OSError, psutil.Error):  # it has ended meanwhile
            groups = Path(f"/proc/{process.pid}/cgroup").read_text()
            if group in groups and command in " ".join(process.cmdline()):
                found.append((process.create_time(), process.pid, process))
    return [process for *_, process in sorted(found)]


class ChildLog:
    """Records every child that ever exists, to detect even short-lived duplicates."""

    def __init__(self, platform: Platform) -> None:
        self._uids: dict[tuple[str, str, str], set[str]] = defaultdict(set)
        self._stop = threading.Event()
        core = platform.core
        self._threads = [
            threading.Thread(target=self._follow, args=(kind, listing), daemon=True)
            for kind, listing in (
                ("Pod", core.list_namespaced_pod),
                ("Service", core.list_namespaced_service),
                ("ConfigMap", core.list_namespaced_config_map),
            )
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()

    def of(self, job: str) -> dict[tuple[str, str], int]:
        """Number of objects that ever existed for each (kind, name) of a run's children."""
        return {(kind, name): len(uids) for (owner, kind, name), uids in self._uids.items() if owner == job}

    def _follow(self, kind: str, listing: Any) -> None:
        selector = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
        while not self._stop.is_set():
            with contextlib.suppress(HTTPError, client.ApiException):  # the cluster may be going down
                for event in watch.Watch().stream(listing, NAMESPACE, label_selector=selector, timeout_seconds=60):
                    meta = event["object"].metadata
                    self._uids[meta.owner_references[0].name, kind, meta.name].add(meta.uid)

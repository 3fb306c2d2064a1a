"""What the end-to-end tests do as a user of the cluster would, and a record of every child that ever existed."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import yaml
from internvl_api.constants import GROUP, LABEL_MANAGED_BY, MANAGED_BY, PLURAL, VERSION
from internvl_api.status import InternVLFineTuneStatus
from ivft_cluster.cluster import Cluster
from ivft_cluster.shell import wait_for
from ivft_demo.data import BUCKET, EXAMPLES
from ivft_demo.follow import changes, follow, read_status
from kubernetes import client, watch
from urllib3.exceptions import HTTPError

NAMESPACE = "default"
RUN_SECONDS = 600


class Platform:
    """What a user of the cluster has: kubectl-like access, object storage, and runs made from the examples."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.api = cluster.api
        self.core: Any = client.CoreV1Api(self.api)
        self.custom: Any = client.CustomObjectsApi(self.api)
        self.s3 = cluster.s3.client()

    def apply(self, example: str, name: str, **spec: Any) -> str:
        """Create an example under another name and output, `spec` laid over its fields; the output's URI."""
        resource = yaml.safe_load((EXAMPLES / f"{example}.yaml").read_text())
        resource["metadata"]["name"] = name
        resource["spec"]["output"] = f"s3://{BUCKET}/runs/{name}"
        for field, value in spec.items():
            below = resource["spec"].get(field)
            both = isinstance(below, dict) and isinstance(value, dict)
            resource["spec"][field] = {**copy.deepcopy(below), **value} if both else value
        self.custom.create_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL, resource)
        return str(resource["spec"]["output"])

    def follow(self, name: str) -> InternVLFineTuneStatus:
        """Wait for the end of a run; RunProblem unless it is a good one."""
        return follow(self.api, name, NAMESPACE, timeout=RUN_SECONDS)

    def wait(self, name: str, what: str, condition: Any, timeout: float = RUN_SECONDS) -> InternVLFineTuneStatus:
        """Wait until `condition(status)` holds; `what` is for the message."""
        seen = None
        try:
            for resource in changes(self.api, name, NAMESPACE, timeout=timeout):
                seen = read_status(resource)
                if condition(seen):
                    return seen
        except RuntimeError as error:
            raise AssertionError(f"{name}: not {what}: {error}; last status {seen}") from error
        raise AssertionError("unreachable")

    def wait_object(self, key: str) -> None:
        """Wait until object storage holds `key`."""
        wait_for(f"object {key}", lambda: self.s3.head_object(Bucket=BUCKET, Key=key), timeout=RUN_SECONDS, every=0.1)

    def delete(self, name: str) -> None:
        """Delete a run and wait until its children are gone."""
        self.custom.delete_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL, name)
        wait_for(f"the children of {name} are gone", lambda: not self.children(name), timeout=120)

    def delete_all(self) -> None:
        """Delete every run, so that no pod outlives the tests."""
        for resource in self.custom.list_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL)["items"]:
            self.delete(resource["metadata"]["name"])

    def children(self, name: str) -> list[str]:
        """Pods, Services and ConfigMaps that the operator made for a run."""
        lists = (
            self.core.list_namespaced_pod,
            self.core.list_namespaced_service,
            self.core.list_namespaced_config_map,
        )
        selector = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
        return [
            item.metadata.name
            for listing in lists
            for item in listing(NAMESPACE, label_selector=selector).items
            if any(owner.name == name for owner in item.metadata.owner_references or ())
        ]

    def kill_operator(self) -> None:
        """SIGKILL to the operator's process; the kubelet starts it again."""
        victims = [process for process in psutil.process_iter(["cmdline"]) if self._is_operator(process)]
        assert victims, "the operator does not run"
        for process in victims:
            process.kill()

    def _is_operator(self, process: psutil.Process) -> bool:
        """Whether it is the operator of this cluster: its pods' control groups carry the cluster's id."""
        command = " ".join(process.info["cmdline"] or [])
        groups = Path(f"/proc/{process.pid}/cgroup")
        return "bin/internvl-operator" in command and f"ivft-{self.cluster.id}-" in groups.read_text()


class ChildLog:
    """Records every child that ever exists, so that a duplicate is seen even when it lives for a moment."""

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
        """(kind, name) of each child that a run ever had, and how many objects ever had it."""
        return {(kind, name): len(uids) for (owner, kind, name), uids in self._uids.items() if owner == job}

    def _follow(self, kind: str, listing: Any) -> None:
        selector = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
        while not self._stop.is_set():
            with contextlib.suppress(HTTPError, client.ApiException):  # the cluster may be going down
                for event in watch.Watch().stream(listing, NAMESPACE, label_selector=selector, timeout_seconds=60):
                    meta = event["object"].metadata
                    self._uids[meta.owner_references[0].name, kind, meta.name].add(meta.uid)

"""The real operator as a process, and what a user sees of a namespace."""

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from controller.builders import Raw, spec
from controller.operator_account import kubeconfig_with, make_account
from internvl_api.constants import API_VERSION, GROUP, KIND, LABEL_MANAGED_BY, MANAGED_BY, PLURAL, VERSION
from ivft_cluster.api_server import ApiServer
from ivft_cluster.ports import free_ports
from ivft_cluster.shell import tail, wait_for
from kubernetes import client, watch
from prometheus_client.parser import text_string_to_metric_families

SELECTOR = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
POD_GROUPS = ("scheduling.volcano.sh", "v1beta1", "podgroups")  # group, version, plural
# Short waits, so that tests of waiting take no time; everything else is as in production.
QUICK = {"RETRY_BASE_SECONDS": "0.3", "SETTLE_SECONDS": "0.3", "PROGRESS_INTERVAL_SECONDS": "0.2"}


class Cluster:
    """One namespace through kubectl's eyes."""

    def __init__(self, server: ApiServer, namespace: str) -> None:
        self.server, self.namespace = server, namespace
        self.core = server.core
        self.runs = client.CustomObjectsApi(server.api)
        self.since = self.core.list_namespaced_pod(namespace).metadata.resource_version

    def create(self, name: str = "run", **changes: Any) -> Raw:
        """Apply an InternVLFineTune; `changes` replace fields of its spec."""
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": spec(**changes)}
        made: Raw = self.runs.create_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, body)
        return made

    def get(self, name: str = "run") -> Raw:
        """The resource as it is now."""
        found: Raw = self.runs.get_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name)
        return found

    def names(self) -> list[str]:
        """Names of the namespace's runs."""
        found = self.runs.list_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL)["items"]
        return [raw["metadata"]["name"] for raw in found]

    def edit(self, change: Raw, name: str = "run") -> None:
        """A merge patch of the spec."""
        self.patch({"spec": change}, name)

    def patch(self, change: Raw, name: str = "run") -> None:
        """A merge patch of anything."""
        self.runs.patch_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name, change)

    def patch_status(self, change: Raw, name: str = "run") -> None:
        """A merge patch of the status, as an operator or a meddler would send it."""
        self.runs.patch_namespaced_custom_object_status(
            GROUP, VERSION, self.namespace, PLURAL, name, {"status": change}
        )

    def delete(self, name: str = "run", **options: Any) -> None:
        """What `kubectl delete` does."""
        self.runs.delete_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name, **options)

    def wait_gone(self) -> None:
        """Wait until the namespace has no run."""
        listed = self.runs.list_namespaced_custom_object
        wait_for("no run is left", lambda: not listed(GROUP, VERSION, self.namespace, PLURAL)["items"], timeout=60)

    def wait(self, what: str, holds: Callable[[Raw], Any], name: str = "run", timeout: float = 60) -> Raw:
        """The status, once `holds(status)`."""

        def look() -> Raw | None:
            status = self.get(name).get("status")
            return status if status and holds(status) else None

        found: Raw = wait_for(what, look, timeout=timeout, on_timeout=lambda: str(self.get(name).get("status")))
        return found

    def wait_workers(self, number: int) -> None:
        """Wait until the operator has seen so many workers run: one that goes earlier is made again without a word."""
        self.wait(f"{number} workers run", lambda status: (status.get("workers") or {}).get("active") == number)

    def wait_condition(self, kind: str, reason: str | None = None, name: str = "run") -> Raw:
        """The condition, once it is True (for that reason)."""
        status = self.wait(
            f"{kind}=True {reason or ''}",
            lambda status: _true(status, kind, reason),
            name,
        )
        return _true(status, kind, reason) or {}

    def wait_condition_seen(self, kind: str, reason: str, name: str = "run", timeout: int = 60) -> Raw:
        """The condition, True for that reason now or at any moment since the namespace was made.

        A stalled run that is tried again says so for an instant only: asking now and then would miss it.
        """
        stream = watch.Watch().stream(
            self.runs.list_namespaced_custom_object,
            GROUP,
            VERSION,
            self.namespace,
            PLURAL,
            resource_version=self.since,
            timeout_seconds=timeout,
        )
        for event in stream:
            found = event["object"]
            if found["metadata"]["name"] == name and (seen := _true(found.get("status") or {}, kind, reason)):
                return seen
        raise AssertionError(f"{kind}=True {reason} was never seen in {timeout} s: {self.get(name).get('status')}")

    def pods(self) -> list[str]:
        """Names of the run's pods."""
        return self.children()["Pod"]

    def children(self) -> dict[str, list[str]]:
        """Names of all children, by kind."""
        listings = {
            "Pod": self.core.list_namespaced_pod,
            "Service": self.core.list_namespaced_service,
            "ConfigMap": self.core.list_namespaced_config_map,
        }
        return {
            kind: sorted(item.metadata.name for item in listing(self.namespace, label_selector=SELECTOR).items)
            for kind, listing in listings.items()
        }

    def history(self, listing: Any) -> Iterator[tuple[str, Any]]:
        """Every event of a kind since the namespace was made."""
        stream = watch.Watch().stream
        for event in stream(
            listing, self.namespace, label_selector=SELECTOR, resource_version=self.since, timeout_seconds=1
        ):
            yield event["type"], event["object"]


class OperatorProcess:
    """Started on entering, killed on leaving; its log is in `log`.

    It has the rights of the chart's ServiceAccount, whose namespace is the cluster's. `kubeconfig`: another way to the
    server than its own.
    """

    def __init__(self, cluster: Cluster, folder: Path, kubeconfig: Path | None = None, **settings: str) -> None:
        self.log = folder / "operator.log"
        self._cluster, self._through = cluster, kubeconfig or cluster.server.kubeconfig
        self._settings = {"NAMESPACES": cluster.namespace, "LOG_LEVEL": "INFO"} | QUICK | settings
        self._kubeconfig: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns as soon as it works, or stands by."""
        self.launch()
        wait_for("the operator is ready", self.ready, timeout=60, on_timeout=lambda: tail(self.log))

    def launch(self) -> None:
        """Returns at once."""
        if self._kubeconfig is None:
            token = make_account(self._cluster.server, self._cluster.namespace, self._settings)
            self._kubeconfig = kubeconfig_with(token, self._through, self.log.with_name("operator.kubeconfig"))
        self.metrics_port, self.liveness_port = free_ports(2)
        ports = {"METRICS_PORT": str(self.metrics_port), "LIVENESS_PORT": str(self.liveness_port)}
        ours = {f"INTERNVL_OPERATOR_{key}": value for key, value in (self._settings | ports).items()}
        with self.log.open("ab") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "internvl_operator"],
                env={**os.environ, "KUBECONFIG": str(self._kubeconfig), **ours},
                stdout=sink,
                stderr=sink,
            )

    @property
    def started(self) -> bool:
        """Whether there is a process to end."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL: no time to say anything."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self.signal(signal.SIGTERM)
        return self.ended()

    @property
    def log_text(self) -> str:
        """All that it has logged."""
        return self.log.read_text(encoding="utf-8")

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        assert self._process is not None
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Any signal, such as SIGSTOP."""
        assert self._process is not None
        self._process.send_signal(number)

    def ended(self, timeout: float = 30) -> int:
        """Wait for the end; the exit code."""
        assert self._process is not None
        return self._process.wait(timeout=timeout)

    def ready(self) -> bool:
        """What the kubelet's readiness probe sees."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.liveness_port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)

    def remembered(self, namespace: str) -> float:
        """How many runs of a namespace the operator has metrics of."""
        return self.metric("internvl_job_phase", job_namespace=namespace)

    def metric(self, name: str, /, **labels: str) -> float:
        """Sum of a metric's samples that carry these labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def __enter__(self) -> "OperatorProcess":
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.started:
            self.kill()


def _true(status: Raw, kind: str, reason: str | None) -> Raw | None:
    for condition in status.get("conditions", ()):
        if (condition["type"], condition["status"]) == (kind, "True") and reason in (None, condition["reason"]):
            found: Raw = condition
            return found
    return None

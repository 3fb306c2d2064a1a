"""etcd and kube-apiserver alone, on loopback: a real API in a few seconds, without nodes and without root."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from kubernetes import client, config

from ivft_cluster import daemons
from ivft_cluster.control_plane import ControlPlane
from ivft_cluster.ports import free_ports
from ivft_cluster.shell import wait_for

CONTROLLERS = ("garbagecollector", "namespace")


class ApiServer:
    """Start with `with ApiServer(folder) as api_server:`; use `kubeconfig`, or the clients `api` and `core`.

    Nothing schedules or runs pods (see `fake_kubelet`). `controllers` names what the controller-manager runs: by
    default children of a deleted owner and the contents of a deleted namespace go; an empty tuple runs none.
    Its processes die with this one; start it from the main thread, which is the one they watch.
    """

    def __init__(
        self,
        state: Path,
        controllers: Sequence[str] = CONTROLLERS,
        scheduler: bool = False,
    ) -> None:
        port, etcd_port, peer_port = free_ports(3)
        self.state = state
        self.controllers = tuple(controllers)
        self.scheduler = scheduler
        self.control_plane = ControlPlane(
            f"api-{uuid.uuid4().hex[:8]}",
            state,
            port=port,
            etcd_port=etcd_port,
            etcd_peer_port=peer_port,
            die_with_parent=True,
            disabled_admission=("ServiceAccount",),  # no controller creates the default account
        )

    @property
    def url(self) -> str:
        return self.control_plane.server

    @property
    def kubeconfig(self) -> Path:
        return self.control_plane.pki / "admin.kubeconfig"

    @cached_property
    def api(self) -> Any:
        """A `kubernetes` client for this server alone (no global configuration is touched)."""
        return config.new_client_from_config(str(self.kubeconfig))  # type: ignore[no-untyped-call]

    @property
    def core(self) -> Any:
        return client.CoreV1Api(self.api)

    def start(self) -> None:
        """Start both servers. Raises HarnessError with the end of the failed one's log."""
        self.control_plane.issue_certificates()
        self.control_plane.start_etcd()
        self.control_plane.start_apiserver()
        self.control_plane.wait_ready(self.url)
        if self.controllers:
            self.control_plane.start_controller_manager(self.controllers)
        if self.scheduler:
            self.control_plane.start_scheduler()
        wait_for("the default namespace", lambda: self.core.read_namespace("default"))

    def stop(self) -> None:
        daemons.kill(daemons.find(self.control_plane.id))
        shutil.rmtree(self.state / "etcd", ignore_errors=True)

    def restart_apiserver(self) -> None:
        """Kill the API server and start it again on the same data and port."""
        self.stop_apiserver()
        self.control_plane.start_apiserver()
        self.control_plane.wait_ready(self.url)

    def stop_apiserver(self) -> None:
        daemons.kill(daemons.find(f"{self.control_plane.id}/kube-apiserver"))

    @contextmanager
    def namespace(self, prefix: str = "test") -> Iterator[str]:
        """A fresh namespace for one test, deleted afterwards (its contents go when `namespace` controls).

        Pods go at once: one that waits for a kubelet keeps the namespace and everything in it, so that an operator of
        the whole cluster in a later test would find the runs of this one.
        """
        name = f"{prefix}-{uuid.uuid4().hex[:8]}"
        self.core.create_namespace({"metadata": {"name": name}})
        try:
            yield name
        finally:
            self.core.delete_namespace(name)
            self.core.delete_collection_namespaced_pod(name, grace_period_seconds=0)

    def __enter__(self) -> ApiServer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

"""The members of a cluster, found by its state directory: servers, nodes, addresses, credentials and logs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from kubernetes import client, config

from ivft_cluster import network, node
from ivft_cluster.control_plane import ControlPlane
from ivft_cluster.network import CONTROL_PLANE, CONTROL_PLANE_IP, Namespace
from ivft_cluster.node import NodeSpec
from ivft_cluster.paths import default_state_dir
from ivft_cluster.prometheus import Prometheus
from ivft_cluster.s3 import S3Server
from ivft_cluster.settings import Settings
from ivft_cluster.shell import HarnessError, tail, wait_for

S3_PORT, PROMETHEUS_PORT = 8333, 9090


class Members:
    """What a cluster consists of; making this object starts nothing."""

    def __init__(self, state: Path | str | None = None) -> None:
        self.state = Path(state or os.environ.get("IVFT_CLUSTER_STATE") or default_state_dir()).absolute()
        self.id = hashlib.sha256(str(self.state).encode()).hexdigest()[:6]

    @property
    def settings(self) -> Settings:
        path = self.state / "cluster.json"
        if not path.exists():
            raise HarnessError(f"no cluster in {self.state}: run `python -m ivft_cluster up` first")
        return Settings.load(path)

    @property
    def node_names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.settings.nodes + 1)]

    @property
    def kubeconfig(self) -> Path:
        """Administrator's kubeconfig for this machine's own network (through the gateway)."""
        return self.state / "kubeconfig"

    @property
    def kubeconfig_inside(self) -> Path:
        """The same for a process inside the control plane's network (`exec`)."""
        return self.control_plane.pki / "admin.kubeconfig"

    @property
    def s3_endpoint_inside(self) -> str:
        return f"http://{CONTROL_PLANE_IP}:{S3_PORT}"

    @property
    def prometheus_inside(self) -> str:
        return f"http://{CONTROL_PLANE_IP}:{PROMETHEUS_PORT}"

    @cached_property
    def network(self) -> Namespace:
        return Namespace.find(self._member(CONTROL_PLANE))

    @cached_property
    def control_plane(self) -> ControlPlane:
        return ControlPlane(self.id, self.state, CONTROL_PLANE_IP, netns=self.network.prefix)

    @cached_property
    def s3(self) -> S3Server:
        return S3Server(
            self._member("s3"),
            self.state / "s3",
            self.settings.s3,
            CONTROL_PLANE_IP,
            S3_PORT,
            f"http://127.0.0.1:{self.settings.s3_gateway}",
            # Each gRPC port has a socket /tmp/seaweedfs-*-<port>.sock too, which no network hides.
            inner_ports=tuple(range(first := 10_000 + int(self.id, 16) % 2_000 * 8, first + 7)),
            netns=self.network.prefix,
        )

    @cached_property
    def prometheus(self) -> Prometheus:
        return Prometheus(
            self._member("prometheus"),
            self.state / "prometheus",
            CONTROL_PLANE_IP,
            PROMETHEUS_PORT,
            f"http://127.0.0.1:{self.settings.prometheus_gateway}",
            netns=self.network.prefix,
        )

    @cached_property
    def api(self) -> Any:
        """A `kubernetes` client for this cluster alone (no global configuration is touched)."""
        return config.new_client_from_config(str(self.kubeconfig))  # type: ignore[no-untyped-call]

    @property
    def core(self) -> Any:
        return client.CoreV1Api(self.api)

    @property
    def env_inside(self) -> dict[str, str]:
        return {
            **self.s3.env,
            "AWS_ENDPOINT_URL_S3": self.s3_endpoint_inside,
            "KUBECONFIG": str(self.kubeconfig_inside),
            "PROMETHEUS_URL": self.prometheus_inside,
            "IVFT_CLUSTER_STATE": str(self.state),
        }

    @property
    def env(self) -> dict[str, str]:
        """The same variables for a process in this machine's own network."""
        return {
            **self.s3.env,
            "KUBECONFIG": str(self.kubeconfig),
            "PROMETHEUS_URL": self.prometheus.url,
            "IVFT_CLUSTER_STATE": str(self.state),
        }

    def node_log(self, name: str, daemon: str = "kubelet") -> str:
        return tail(self._log(name)) + "\n" + tail(self.state / name / f"log/{daemon}.log")

    # --- parts

    def wait_nodes_ready(self, names: Iterable[str] | None = None, timeout: float = 120) -> None:
        wanted = set(names or self.node_names)

        def ready() -> bool:
            return wanted <= {
                each.metadata.name
                for each in self.core.list_node().items
                if any(c.type == "Ready" and c.status == "True" for c in each.status.conditions or [])
            }

        def logs() -> str:
            return "\n".join(f"--- {name}\n{self.node_log(name)}" for name in wanted)

        wait_for(f"nodes {sorted(wanted)} are Ready", ready, timeout=timeout, on_timeout=logs)

    def _member(self, name: str) -> str:
        return f"{self.id}/{name}"

    def _log(self, name: str) -> Path:
        return self.state / "logs" / f"{name}.log"

    def _number(self, name: str) -> int:
        if name not in self.node_names:
            raise HarnessError(f"no node {name!r}: the cluster has {', '.join(self.node_names)}")
        return self.node_names.index(name) + 1

    @property
    def _api_server_outside(self) -> str:
        return f"https://127.0.0.1:{self.settings.api_gateway}"

    def _start_node(self, number: int) -> None:
        name = f"node{number}"
        spec = NodeSpec(
            self.id,
            name,
            number,
            network.node_ip(number),
            network.pod_cidr(number),
            self.state / name,
            self.control_plane.pki,
        )
        own_network = Namespace.create(spec.member, self._log(name))
        network.connect_node(self.network, own_network, number, self.settings.nodes)
        node.start(spec, own_network, self._log(name))

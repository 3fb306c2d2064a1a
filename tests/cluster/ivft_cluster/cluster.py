"""The whole: control plane, nodes, object storage, Prometheus, DNS and gateway, each a member of one cluster."""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import psutil
from kubernetes import client, config

from ivft_cluster import cgroups, daemons, machine, network, node
from ivft_cluster.control_plane import ControlPlane
from ivft_cluster.network import CONTROL_PLANE, CONTROL_PLANE_IP, HOLDER, Namespace
from ivft_cluster.node import NodeSpec
from ivft_cluster.oci import Image, import_archives, import_images
from ivft_cluster.paths import PACKAGE, default_state_dir
from ivft_cluster.pki import Authority
from ivft_cluster.prometheus import Prometheus
from ivft_cluster.releases import binary
from ivft_cluster.s3 import S3Server
from ivft_cluster.settings import Settings
from ivft_cluster.shell import HarnessError, phase, tail, wait_for

T = TypeVar("T")
S3_PORT, PROMETHEUS_PORT = 8333, 9090


class Cluster:
    """A cluster by its state directory; attaching to one that is up is just making this object.

    From outside (this process) use `kubeconfig`, `s3` and `prometheus`: gateways on loopback lead in. From pods,
    object storage is at `s3_endpoint_inside`.
    """

    def __init__(self, state: Path | str | None = None) -> None:
        self.state = Path(state or os.environ.get("IVFT_CLUSTER_STATE") or default_state_dir()).absolute()
        self.id = hashlib.sha256(str(self.state).encode()).hexdigest()[:6]

    # --- what it is

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

    # --- up and down

    def is_up(self) -> bool:
        return bool(daemons.find(self._member(CONTROL_PLANE)))

    def up(self, nodes: int = 2) -> None:
        """Bring up a fresh cluster with every node Ready; what an earlier one left in this state is removed first.

        Raises HarnessError naming the part that did not start, with the end of its log.
        """
        machine.require_root()
        binary("kubelet")
        with phase("clean state"):
            self.down()
            shutil.rmtree(self.state / "logs", ignore_errors=True)
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        Settings.make(nodes).save(self.state / "cluster.json")
        with phase("network, certificates, daemons started"):
            self.network = Namespace.create(self._member(CONTROL_PLANE), self._log(CONTROL_PLANE))
            network.make_bridge(self.network)
            authority = self.control_plane.issue_certificates()
            self.control_plane.start_etcd()
            self.control_plane.start_apiserver()
            self._start_gateway(authority)
            for number in range(1, nodes + 1):
                self._issue_node(authority, number)
                self._start_node(number)
            self.s3.start()
        with phase("API server ready"):
            self.control_plane.wait_ready(self._api_server_outside)
        with phase("controllers, scheduler, DNS, Prometheus, object storage"):
            self.control_plane.start_controller_manager()
            self.control_plane.start_scheduler()
            self._start_watchers()
            self.prometheus.start()
            self.s3.wait_ready()
        with phase(f"{nodes} nodes Ready"):
            self.wait_nodes_ready()
            self.prometheus.wait_ready()
            self.wait_pods_admitted("default")

    def down(self) -> None:
        """Remove every process, namespace, mount, cgroup and file of this cluster, but not its logs. Idempotent."""
        self._kill_all()
        self._forget()
        cgroups.remove(f"ivft-{self.id}-")
        for path in self.state.glob("*"):
            if path.name != "logs":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _kill_all(self) -> None:
        """Members, and whatever else lives in one of their networks (an operator started by `exec`, say)."""
        members = daemons.find(self.id)
        networks = {network.namespace_of(process.pid) for process in members if daemons.name_of(process) == HOLDER}
        networks -= {network.namespace_of(1), None}
        mine = {psutil.Process().pid, *(parent.pid for parent in psutil.Process().parents())}
        guests = [process for process in psutil.process_iter() if network.namespace_of(process.pid) in networks]
        everyone = {process.pid: process for process in [*members, *guests] if process.pid not in mine}
        daemons.kill(list(everyone.values()))

    def _forget(self) -> None:
        for name in ("network", "control_plane", "s3", "prometheus", "api"):
            self.__dict__.pop(name, None)

    # --- using it

    def exec(self, argv: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[Any]:
        """`subprocess.run` inside the control plane's network, with KUBECONFIG and the S3 variables set.

        The virtualenv's tools (kubectl, kopf, …) come first in PATH.
        """
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        env = {**os.environ, "PATH": tools, **self.env_inside}
        return subprocess.run([*self.network.prefix, *(str(word) for word in argv)], env=env, **options)

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

    def kubectl(self, *arguments: str, **options: Any) -> str:
        """Output of kubectl. Raises CalledProcessError."""
        command = [str(binary("kubectl")), f"--kubeconfig={self.kubeconfig}", *arguments]
        cache = f"--cache-dir={self.state / 'kubectl-cache'}"
        done = subprocess.run([*command, cache], check=True, stdout=subprocess.PIPE, text=True, **options)
        return str(done.stdout)

    def load(self, *images: Image) -> dict[str, list[str]]:
        """Load images into every node's containerd, all nodes at once.

        Returns, for each node, the names that were really imported: what is there already is left alone.
        """
        return self._on_nodes(lambda inside: import_images(inside, images))

    def load_archives(self, *archives: Path) -> None:
        """Load OCI or Docker image archives into every node's containerd."""
        self._on_nodes(lambda inside: import_archives(inside, archives))

    def _on_nodes(self, work: Callable[[tuple[str, ...]], T]) -> dict[str, T]:
        names = self.node_names
        with ThreadPoolExecutor(len(names)) as pool:
            results = pool.map(lambda name: work(node.shell_prefix(self._member(name))), names)
            return dict(zip(names, results, strict=True))

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

    @contextmanager
    def namespace(self, prefix: str = "test") -> Iterator[str]:
        """A fresh namespace for one test, ready to take pods; deleted afterwards with all it holds."""
        name = str(self.core.create_namespace({"metadata": {"generateName": f"{prefix}-"}}).metadata.name)
        self.wait_pods_admitted(name)
        try:
            yield name
        finally:
            self.core.delete_namespace(name)

    def wait_pods_admitted(self, namespace: str) -> None:
        """Pods are refused until their namespace has its default service account, and on old servers its token."""
        probe = {"metadata": {"name": "probe"}, "spec": {"containers": [{"name": "probe", "image": "probe"}]}}
        wait_for(
            f"namespace {namespace} takes pods",
            lambda: self.core.create_namespaced_pod(namespace, probe, dry_run="All"),
        )

    def node_log(self, name: str, daemon: str = "kubelet") -> str:
        return tail(self._log(name)) + "\n" + tail(self.state / name / f"log/{daemon}.log")

    def add_devices(self, name: str, resource: str, amount: int) -> None:
        """Give a node devices, `nvidia.com/gpu` say: the kubelet counts and allocates them. They go with the node."""
        node.start_device_plugin(self._member(name), resource, amount, self._log(name))

        def allocatable() -> bool:
            return bool(self.core.read_node(name).status.allocatable.get(resource) == str(amount))

        wait_for(f"{name} has {amount} {resource}", allocatable, timeout=60)

    def remove_devices(self, name: str, resource: str) -> None:
        daemons.kill(daemons.find(node.device_plugin(self._member(name), resource)))

    def memory_available(self, name: str) -> int:
        """Bytes that a node's kubelet counts as free."""
        summary = self.core.connect_get_node_proxy_with_path(name, "stats/summary")
        return int(ast.literal_eval(summary)["node"]["memory"]["availableBytes"])

    # --- breaking it

    def kill_node(self, name: str) -> None:
        """As if the power went: every process of the node, its pods and its network are gone at once."""
        daemons.kill(daemons.find(self._member(name)))

    def start_node(self, name: str) -> None:
        """Power it on again; its pods' containers are forgotten, its images are not."""
        self._start_node(self._number(name))

    def shut_down_node(self, name: str, timeout: float = 60) -> None:
        """Announce a shutdown to the node's kubelet, and power the node off when the kubelet has ended its pods."""
        node.shut_down(self._member(name), self.state / name, timeout)
        self.kill_node(name)

    def set_eviction(self, name: str, signal: str, threshold: str) -> None:
        """Restart a node's kubelet with another hard eviction threshold, such as memory.available below 1Gi."""
        node.set_eviction(self._member(name), self.state / name, signal, threshold)
        self.wait_nodes_ready([name])

    def cut(self, one: str, other: str) -> None:
        """Drop every packet between two nodes and their pods, or a node and `control-plane` (S3, Prometheus, API)."""
        self._drop(one, other, on=True)

    def heal(self, one: str, other: str) -> None:
        self._drop(one, other, on=False)

    def stop_apiserver(self) -> None:
        daemons.kill(daemons.find(self._member("kube-apiserver")))

    def start_apiserver(self) -> None:
        self.control_plane.start_apiserver()
        self.control_plane.wait_ready(self._api_server_outside)

    def restart_apiserver(self) -> None:
        self.stop_apiserver()
        self.start_apiserver()

    # --- parts

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

    def _start_gateway(self, authority: Authority) -> None:
        authority.kubeconfig("admin", self._api_server_outside, self.kubeconfig)
        settings = self.settings
        routes = {
            settings.api_gateway: self.control_plane.port,
            settings.s3_gateway: S3_PORT,
            settings.prometheus_gateway: PROMETHEUS_PORT,
        }
        ports = [f"{near}={CONTROL_PLANE_IP}:{far}" for near, far in routes.items()]
        self._start_python("gateway", [], str(self.network.pid), *ports)

    def _start_watchers(self) -> None:
        kubeconfig = str(self.kubeconfig_inside)
        self._start_python("dns_server", self.network.prefix, kubeconfig, CONTROL_PLANE_IP)
        self._start_python("discovery", self.network.prefix, kubeconfig, str(self.prometheus.targets))

    def _start_python(self, module: str, prefix: Sequence[str], *arguments: str) -> None:
        daemons.start(
            self._member(module),
            [*prefix, sys.executable, "-m", f"ivft_cluster.{module}", *arguments],
            self._log(module),
            env={"PYTHONPATH": str(PACKAGE.parent)},
        )

    def _issue_node(self, authority: Authority, number: int) -> None:
        name = f"node{number}"
        authority.issue(name, f"system:node:{name}", "system:nodes", hosts=[name, "127.0.0.1", network.node_ip(number)])
        authority.kubeconfig(name, self.control_plane.server)

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

    def _drop(self, one: str, other: str, *, on: bool) -> None:
        for here, there in ((one, other), (other, one)):
            if there == CONTROL_PLANE:
                sources = [CONTROL_PLANE_IP]
            else:
                number = self._number(there)
                sources = [network.node_ip(number), network.pod_cidr(number)]
            network.drop_from(Namespace.find(self._member(here)), sources, on=on)

"""The whole: control plane, nodes, object storage, Prometheus, DNS and gateway, each a member of one cluster."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

from ivft_cluster import cgroups, daemons, disk, machine, network, node
from ivft_cluster.faults import Faults
from ivft_cluster.members import PROMETHEUS_PORT, S3_PORT
from ivft_cluster.network import CONTROL_PLANE, CONTROL_PLANE_IP, HOLDER, Namespace
from ivft_cluster.oci import Image, import_archives, import_images, missing_images
from ivft_cluster.paths import PACKAGE
from ivft_cluster.pki import Authority
from ivft_cluster.releases import binary
from ivft_cluster.settings import Settings
from ivft_cluster.shell import phase, wait_for

T = TypeVar("T")


class Cluster(Faults):
    """A cluster by its state directory; attaching to one that is up is just making this object.

    From outside (this process) use `kubeconfig`, `s3` and `prometheus`: gateways on loopback lead in. From pods,
    object storage is at `s3_endpoint_inside`.
    """

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
        guests = [process for process in daemons.everyone() if network.namespace_of(process.pid) in networks]
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

    def kubectl(self, *arguments: str, **options: Any) -> str:
        """Output of kubectl. Raises CalledProcessError."""
        command = [str(binary("kubectl")), f"--kubeconfig={self.kubeconfig}", *arguments]
        cache = f"--cache-dir={self.state / 'kubectl-cache'}"
        done = subprocess.run([*command, cache], check=True, stdout=subprocess.PIPE, text=True, **options)
        return str(done.stdout)

    def load(self, *images: Image) -> dict[str, list[str]]:
        """Load images into every node's containerd, all nodes at once.

        Returns, for each node, the names that were really imported: what is there already is left alone.
        Raises HarnessError when the disk has no room for them.
        """
        lacking = self._on_nodes(lambda inside: missing_images(inside, images)).values()
        disk.require_for_nodes({image for missing in lacking for image in missing}, nodes=len(lacking))
        return self._on_nodes(lambda inside: import_images(inside, images))

    def load_archives(self, *archives: Path) -> None:
        """Load OCI or Docker image archives into every node's containerd."""
        self._on_nodes(lambda inside: import_archives(inside, archives))

    def _on_nodes(self, work: Callable[[tuple[str, ...]], T]) -> dict[str, T]:
        names = self.node_names
        with ThreadPoolExecutor(len(names)) as pool:
            results = pool.map(lambda name: work(node.shell_prefix(self._member(name))), names)
            return dict(zip(names, results, strict=True))

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

    def memory_available(self, name: str) -> int:
        """Bytes that a node's kubelet counts as free."""
        summary = self.core.connect_get_node_proxy_with_path(name, "stats/summary")
        return int(ast.literal_eval(summary)["node"]["memory"]["availableBytes"])

    # --- parts

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

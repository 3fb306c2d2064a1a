"""Break a running cluster and mend it: nodes, devices, the network and the API server."""

from __future__ import annotations

from ivft_cluster import daemons, network, node
from ivft_cluster.members import Members
from ivft_cluster.network import CONTROL_PLANE, CONTROL_PLANE_IP, Namespace
from ivft_cluster.shell import wait_for


class Faults(Members):
    """What tests do to a cluster that is up."""

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

    def add_devices(self, name: str, resource: str, amount: int) -> None:
        """Give a node devices, `nvidia.com/gpu` say: the kubelet counts and allocates them. They go with the node."""
        node.start_device_plugin(self._member(name), resource, amount, self._log(name))

        def allocatable() -> bool:
            return bool(self.core.read_node(name).status.allocatable.get(resource) == str(amount))

        wait_for(f"{name} has {amount} {resource}", allocatable, timeout=60)

    def remove_devices(self, name: str, resource: str) -> None:
        daemons.kill(daemons.find(node.device_plugin(self._member(name), resource)))

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

    def _drop(self, one: str, other: str, *, on: bool) -> None:
        for here, there in ((one, other), (other, one)):
            if there == CONTROL_PLANE:
                sources = [CONTROL_PLANE_IP]
            else:
                number = self._number(there)
                sources = [network.node_ip(number), network.pod_cidr(number)]
            network.drop_from(Namespace.find(self._member(here)), sources, on=on)

"""Network namespaces. One idle process holds each; when it dies, the namespace and its veths disappear."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ivft_cluster import daemons
from ivft_cluster.shell import HarnessError, run, wait_for

CONTROL_PLANE = "control-plane"
CONTROL_PLANE_IP = "10.200.0.1"
POD_CIDR = "10.244.0.0/16"
HOLDER = "sleep"


@dataclass(frozen=True)
class Namespace:
    """The network namespace of `<cluster id>/<name>`."""

    pid: int

    @classmethod
    def create(cls, member: str, log: Path) -> Namespace:
        holder = daemons.start(member, ["unshare", "--net", "--", HOLDER, "infinity"], log)
        outside = os.readlink("/proc/self/ns/net")
        wait_for("a network namespace", lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != outside, every=0.005)
        namespace = cls(holder.pid)
        namespace.ip("link set lo up")
        namespace.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        return namespace

    @classmethod
    def find(cls, member: str) -> Namespace:
        """Raises HarnessError when the cluster is not up."""
        for process in daemons.find(member):
            if daemons.name_of(process) == HOLDER:
                return cls(process.pid)
        raise HarnessError(f"{member} is not running: bring the cluster up first")

    @property
    def prefix(self) -> tuple[str, ...]:
        """The command prefix that runs a command inside."""
        return ("nsenter", f"--net=/proc/{self.pid}/ns/net", "--")

    def run(self, *argv: str | Path) -> str:
        return run([*self.prefix, *argv])

    def ip(self, *lines: str) -> None:
        """Several `ip` commands, in one process."""
        run([*self.prefix, "ip", "-batch", "-"], input="\n".join(lines))


def make_bridge(control_plane: Namespace) -> None:
    control_plane.ip("link add br0 type bridge", f"addr add {CONTROL_PLANE_IP}/24 dev br0", "link set br0 up")


def node_ip(number: int) -> str:
    return f"10.200.0.{10 + number}"


def pod_cidr(number: int) -> str:
    return f"10.244.{number}.0/24"


def connect_node(control_plane: Namespace, node: Namespace, number: int, nodes: int) -> None:
    """Plug node `number` (from 1) into the bridge and give both sides their routes to the pods."""
    control_plane.ip(
        f"link add veth{number} type veth peer name eth0 netns {node.pid}",
        f"link set veth{number} master br0 up",
        f"route replace {pod_cidr(number)} via {node_ip(number)}",
    )
    others = [other for other in range(1, nodes + 1) if other != number]
    node.ip(
        f"addr add {node_ip(number)}/24 dev eth0",
        "link set eth0 up",
        f"route add default via {CONTROL_PLANE_IP}",
        # The kubelet queries a cloud's metadata address: refuse at once to avoid two timeouts of 5 s.
        "route add unreachable 169.254.0.0/16",
        *(f"route add {pod_cidr(other)} via {node_ip(other)}" for other in others),
    )


def drop_from(namespace: Namespace, sources: list[str], *, on: bool) -> None:
    """Drop (or stop dropping) packets from `sources`, before connection tracking sees them."""
    for source in sources:
        namespace.run("iptables", "-w", "-t", "raw", "-A" if on else "-D", "PREROUTING", "-s", source, "-j", "DROP")


def namespace_of(pid: int) -> str | None:
    """The name of a process's network namespace; None if the process is gone or not accessible."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None

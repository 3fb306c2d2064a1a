"""A node seen from outside: configure, start, kill and query it."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from ivft_cluster import daemons
from ivft_cluster.network import HOLDER, Namespace
from ivft_cluster.paths import PACKAGE
from ivft_cluster.releases import binary
from ivft_cluster.shell import wait_for

# Fixed in the kubelet and in containerd. Left on the machine when the node is gone: removing a folder that some other
# node has mounted something on would unmount it there (see "detach_mounts" in the kernel's fs/namespace.c).
MOUNT_POINTS = (Path("/var/lib/kubelet"), Path("/var/lib/cni"))
SHUT_DOWN_MARK = "shut-down"  # file in the node's state, created when its kubelet allows the shutdown


@dataclass(frozen=True)
class NodeSpec:
    """Configuration for process 1 of a node; written to `<state>/node.json`."""

    cluster: str
    name: str
    number: int
    ip: str
    pod_cidr: str
    state: Path
    pki: Path

    @property
    def member(self) -> str:
        return f"{self.cluster}/{self.name}"

    @property
    def cgroup(self) -> str:
        return f"ivft-{self.cluster}-{self.name}"

    @classmethod
    def load(cls, path: Path) -> NodeSpec:
        fields = json.loads(path.read_text())
        return cls(**{**fields, "state": Path(fields["state"]), "pki": Path(fields["pki"])})

    def save(self) -> Path:
        self.state.mkdir(parents=True, exist_ok=True)
        path = self.state / "node.json"
        path.write_text(json.dumps(asdict(self), default=str))
        return path


def start(spec: NodeSpec, network: Namespace, log: Path) -> None:
    for path in MOUNT_POINTS:
        path.mkdir(parents=True, exist_ok=True)
    unshare = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
    python: list[str | Path] = [sys.executable, "-m", "ivft_cluster.node_main", spec.save()]
    daemons.start(
        spec.member,
        [*network.prefix, *unshare, "--propagation=private", "--", *python],
        log,
        env={"PYTHONPATH": os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))},
    )


def shell_prefix(member: str) -> tuple[str, ...]:
    """The command prefix that runs a command in the node's network, mount and process namespaces."""
    (init,) = [p for p in daemons.find(member) if daemons.name_of(p) != HOLDER and _pid_inside(p.pid) == 1]
    return ("nsenter", f"--target={init.pid}", "--net", "--mount", "--pid", "--ipc", "--uts", "--")


def device_plugin(member: str, resource: str) -> str:
    """The member that serves a resource's devices."""
    return f"{member}/devices-of-{resource.replace('/', '-')}"


def start_device_plugin(member: str, resource: str, amount: int, log: Path) -> None:
    plugin = [binary("device-plugin"), f"--resource={resource}", f"--count={amount}"]
    daemons.start(device_plugin(member, resource), [*shell_prefix(member), *plugin], log)


def shut_down(member: str, state: Path, timeout: float) -> None:
    """Ask the kubelet to end the node's pods, as systemd does before a shutdown, and wait until it is done."""
    (login,) = [each for each in daemons.find(member) if daemons.name_of(each) == "logind"]
    login.send_signal(signal.SIGUSR1)
    wait_for("the kubelet lets the node shut down", (state / SHUT_DOWN_MARK).exists, timeout=timeout)


def set_eviction(member: str, state: Path, eviction_signal: str, threshold: str) -> None:
    """Change the kubelet's configuration and kill the kubelet; process 1 of the node restarts it."""
    path = state / "kubelet.yaml"
    config = yaml.safe_load(path.read_text())
    config["evictionHard"][eviction_signal] = threshold
    path.write_text(yaml.safe_dump(config))
    daemons.kill([each for each in daemons.find(member) if daemons.name_of(each) == "kubelet"])


def _pid_inside(pid: int) -> int:
    """The pid a process has in its own namespace (last number of NSpid, see proc(5)); 0 when it has only ours."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    (numbers,) = (line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
    return int(numbers[-1]) if len(numbers) > 1 else 0

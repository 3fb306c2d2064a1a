"""Process 1 of a node: mounts, system bus, containerd, kube-proxy and the kubelet, in the node's own namespaces.

Started by `node.start` as `python -m ivft_cluster.node_main <node.json>`. Every mount below is made in this node's
mount namespace, so nothing of it is left when the process dies.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import yaml

from ivft_cluster import cgroups
from ivft_cluster.images import pause_image
from ivft_cluster.network import CONTROL_PLANE_IP, POD_CIDR
from ivft_cluster.node import SHUT_DOWN_MARK, NodeSpec
from ivft_cluster.oci import CONTAINERD, forget_pruned, import_images
from ivft_cluster.paths import cache_dir
from ivft_cluster.releases import binary
from ivft_cluster.shell import run, wait_for

SYSTEM_BUS = Path("/run/dbus/system_bus_socket")
DBUS_CONFIG = f"""<busconfig>
  <type>system</type>
  <listen>unix:path={SYSTEM_BUS}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/>
    <allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/>
  </policy>
</busconfig>
"""
STALE = ("io.containerd.grpc.v1.cri/containers", "io.containerd.grpc.v1.cri/sandboxes")


def main(spec: NodeSpec) -> None:
    make_mounts(spec)
    cgroups.create(spec.cgroup)
    store, _lock = claim_store(spec.name)
    write_config(spec, store)
    forget_old_containers(spec, store)
    commands: dict[str, list[str | Path]] = {
        "dbus-daemon": ["dbus-daemon", "--nofork", f"--config-file={spec.state}/dbus.conf"],
        "logind": [binary("logind"), spec.state / SHUT_DOWN_MARK],
        "containerd": [binary("containerd"), "--config", spec.state / "containerd.toml"],
        "kube-proxy": proxy_command(spec),
        "kubelet": kubelet_command(spec),
    }
    supervise(spec, commands)


def make_mounts(spec: NodeSpec) -> None:
    (spec.state / SHUT_DOWN_MARK).unlink(missing_ok=True)
    for name in ("kubelet", "log", "cni"):
        (spec.state / name).mkdir(parents=True, exist_ok=True)
    run(["mount", "-t", "tmpfs", "tmpfs", "/run"])
    Path("/run/netns").mkdir()
    SYSTEM_BUS.parent.mkdir()
    for source, target in (("kubelet", "/var/lib/kubelet"), ("log", "/var/log")):
        run(["mount", "--bind", spec.state / source, target])
    run(["mount", "--make-rshared", "/var/lib/kubelet"])
    run(["mount", "-t", "tmpfs", "tmpfs", "/var/lib/cni"])


def claim_store(name: str) -> tuple[Path, IO[str]]:
    """The first content store for this node name that no other running cluster uses, and its lock.

    Stores outlive their cluster: an image is imported once, not at every start.
    """
    for slot in range(16):
        store = cache_dir() / "nodes" / (name if slot == 0 else f"{name}.{slot}")
        store.mkdir(parents=True, exist_ok=True)
        lock = (store / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return store, lock
    raise SystemExit(f"all content stores of {name} are in use: too many clusters are up")


def write_config(spec: NodeSpec, store: Path) -> None:
    (spec.state / "resolv.conf").write_text("")  # pods use only the cluster's DNS
    (spec.state / "dbus.conf").write_text(DBUS_CONFIG)
    (spec.state / "kubelet.yaml").write_text(yaml.safe_dump(kubelet_config(spec)))
    (spec.state / "cni/10-bridge.conflist").write_text(json.dumps(cni_config(spec)))
    (spec.state / "containerd.toml").write_text(
        f"""version = 3
root = "{store}"
state = "/run/containerd"
[grpc]
  address = "{CONTAINERD}"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{pause_image().name}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{spec.state}/cni"
"""
    )


def cni_config(spec: NodeSpec) -> dict[str, object]:
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": spec.pod_cidr}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": "/var/lib/cni/networks",
        },
    }
    return {
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}],
    }


def kubelet_config(spec: NodeSpec) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": "0.0.0.0",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{spec.pki}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{spec.pki}/{spec.name}.crt",
        "tlsPrivateKeyFile": f"{spec.pki}/{spec.name}.key",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{spec.cgroup}",  # one tree per node: two kubelets would clean up each other's pods
        "clusterDomain": "cluster.local",
        "clusterDNS": [CONTROL_PLANE_IP],
        "resolvConf": str(spec.state / "resolv.conf"),
        "containerRuntimeEndpoint": f"unix://{CONTAINERD}",
        "failSwapOn": False,
        "failCgroupV1": False,
        "readOnlyPort": 0,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "evictionPressureTransitionPeriod": "5s",
        "imageGCHighThresholdPercent": 100,  # nodes cannot pull images again
        "podCIDR": spec.pod_cidr,
        "shutdownGracePeriod": "30s",  # logind delays a shutdown this long; the last part is for critical pods
        "shutdownGracePeriodCriticalPods": "5s",
        "nodeStatusUpdateFrequency": "1s",
        "syncFrequency": "10s",
        "volumeStatsAggPeriod": "0s",
        "serializeImagePulls": False,
        "registryPullQPS": 0,
        "eventRecordQPS": 0,
    }


def kubelet_command(spec: NodeSpec) -> list[str | Path]:
    return [
        binary("kubelet"),
        f"--kubeconfig={spec.pki}/{spec.name}.kubeconfig",
        f"--config={spec.state}/kubelet.yaml",
        f"--hostname-override={spec.name}",
        f"--node-ip={spec.ip}",
        "--root-dir=/var/lib/kubelet",
    ]


def proxy_command(spec: NodeSpec) -> list[str | Path]:
    return [
        binary("kube-proxy"),
        f"--kubeconfig={spec.pki}/kube-proxy.kubeconfig",
        "--proxy-mode=iptables",
        f"--cluster-cidr={POD_CIDR}",
        f"--hostname-override={spec.name}",
        f"--bind-address={spec.ip}",
        "--healthz-bind-address=127.0.0.1:10256",
        "--metrics-bind-address=127.0.0.1:10249",
        "--conntrack-max-per-core=0",
    ]


def forget_old_containers(spec: NodeSpec, store: Path) -> None:
    """Remove containers of an earlier cluster from the content store, so that the new kubelet does not see them."""
    if not any(child for folder in STALE if (store / folder).is_dir() for child in (store / folder).iterdir()):
        return
    config = spec.state / "containerd-cleanup.toml"
    config.write_text(
        f'version = 3\nroot = "{store}"\nstate = "/run/containerd"\n'
        f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\n  address = "{CONTAINERD}"\n'
    )
    with (spec.state / "log/containerd-cleanup.log").open("ab") as sink:
        containerd = subprocess.Popen([binary("containerd"), "--config", config], stdout=sink, stderr=sink)
    ctr = [binary("ctr"), "--address", CONTAINERD, "--namespace", "k8s.io"]
    wait_for("containerd", lambda: run([*ctr, "version"]), timeout=30)
    if containers := run([*ctr, "containers", "list", "--quiet"]).split():
        run([*ctr, "containers", "delete", *containers])
    containerd.terminate()
    containerd.wait()
    for folder in STALE:
        shutil.rmtree(store / folder, ignore_errors=True)


def supervise(spec: NodeSpec, commands: dict[str, list[str | Path]]) -> None:
    """Start each command; as process 1, reap every orphan and restart commands that end (like systemd)."""
    running: dict[int, str] = {}

    def launch(name: str) -> None:
        with (spec.state / f"log/{name}.log").open("ab") as sink:
            running[subprocess.Popen([str(word) for word in commands[name]], stdout=sink, stderr=sink).pid] = name

    launch("dbus-daemon")
    wait_for("the system bus", SYSTEM_BUS.exists, timeout=30)
    launch("logind")
    launch("containerd")
    wait_for("containerd", lambda: run([binary("ctr"), "--address", CONTAINERD, "version"]), timeout=30)
    import_images((), [pause_image()])
    forget_pruned(())
    launch("kube-proxy")
    launch("kubelet")
    while True:
        pid, status = os.wait()
        if name := running.pop(pid, None):
            print(f"{name} ended with status {status}: starting it again", flush=True)
            time.sleep(1)
            launch(name)


if __name__ == "__main__":
    main(NodeSpec.load(Path(sys.argv[1])))

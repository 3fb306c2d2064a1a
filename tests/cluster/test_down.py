"""`down` removes every trace, also of a cluster whose start was killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ivft_cluster import cgroups, daemons, images
from ivft_cluster.cluster import Cluster
from ivft_cluster.paths import cache_dir
from ivft_cluster.shell import run, wait_for

pytestmark = pytest.mark.e2e

Identity = tuple[int, float]


@pytest.fixture
def spare() -> Iterator[Cluster]:
    """A cluster beside the session's; short path, since sockets in it may not be longer than 107 characters."""
    other = Cluster(cache_dir() / f"spare-{os.getpid()}")
    yield other
    other.down()
    shutil.rmtree(other.state)


def tree_of(cluster: Cluster) -> dict[Identity, psutil.Process]:
    """Processes that name a file of the cluster in their command line, and everything below them."""
    found = {}
    for process in daemons.everyone():
        try:
            if f"{cluster.state}/" in " ".join(process.cmdline()) and process.pid != os.getpid():
                for each in [process, *process.children(recursive=True)]:
                    found[each.pid, each.create_time()] = each
        except psutil.Error:
            continue
    return found


def namespaces(processes: list[psutil.Process]) -> set[str]:
    found = set()
    for process in processes:
        for kind in ("net", "mnt", "pid"):
            try:
                found.add(os.readlink(f"/proc/{process.pid}/ns/{kind}"))
            except OSError:
                continue
    return found


def own_namespaces() -> set[str]:
    return namespaces([psutil.Process()])


def machine_state() -> dict[str, object]:
    """What a cluster might leave behind on the machine itself."""
    return {
        "mounts": sorted(Path("/proc/self/mounts").read_text().splitlines()),
        "links": sorted(line.split(":")[1] for line in run(["ip", "-o", "link"]).splitlines()),
        "routes": run(["ip", "route"]),
        "firewall": run(["iptables-save"]).count("KUBE"),
    }


def cgroups_of(cluster: Cluster) -> list[Path]:
    return [path for hierarchy in cgroups.hierarchies() for path in hierarchy.rglob(f"*{cluster.id}*")]


def assert_gone(cluster: Cluster, seen: dict[Identity, psutil.Process], spaces: set[str]) -> None:
    assert not [process for process in seen.values() if daemons.is_alive(process)]
    assert not spaces & namespaces(list(daemons.everyone()))
    assert not tree_of(cluster)
    assert not cgroups_of(cluster)
    assert {path.name for path in cluster.state.iterdir()} <= {"logs"}


def test_down_removes_every_trace_and_may_be_repeated(spare: Cluster) -> None:
    before = machine_state()
    spare.up(nodes=1)
    pause = {"name": "main", "image": images.pause_image().name}
    spare.core.create_namespaced_pod(
        "default", {"metadata": {"name": "idle"}, "spec": {"nodeName": "node1", "containers": [pause]}}
    )
    wait_for("the pod runs", lambda: spare.core.read_namespaced_pod("idle", "default").status.phase == "Running")
    guest = subprocess.Popen([*spare.network.prefix, "sleep", "infinity"])
    seen = tree_of(spare)
    spaces = namespaces(list(seen.values())) - own_namespaces()
    assert "pause" in {daemons.name_of(process) for process in seen.values()}
    assert cgroups_of(spare)
    spare.down()
    guest.wait(timeout=5)
    assert_gone(spare, seen, spaces)
    assert machine_state() == before
    spare.down()
    assert machine_state() == before


def test_down_cleans_up_after_a_killed_start(spare: Cluster) -> None:
    before = machine_state()
    command = [sys.executable, "-m", "ivft_cluster", "--state-dir", str(spare.state), "up", "--nodes", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(images.__file__).parents[1])}
    starting = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    wait_for("the node runs", lambda: "kube-proxy" in map(daemons.name_of, tree_of(spare).values()))
    starting.kill()
    starting.wait()
    seen = tree_of(spare)
    spaces = namespaces(list(seen.values())) - own_namespaces()
    assert {daemons.name_of(process) for process in seen.values()} >= {"etcd", "containerd", "kube-proxy"}
    spare.down()
    assert_gone(spare, seen, spaces)
    assert machine_state() == before

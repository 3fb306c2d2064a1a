"""Flags follow the version of the daemon they are for: the same harness runs 1.20 and a current Kubernetes."""

from __future__ import annotations

from pathlib import Path

import pytest
from ivft_cluster import kubernetes, node_main
from ivft_cluster.control_plane import ControlPlane
from ivft_cluster.node import NodeSpec
from ivft_cluster.shell import HarnessError

SPEC = NodeSpec("id", "node1", 1, "10.200.0.11", "10.244.1.0/24", Path("/state/node1"), Path("/state/pki"))
OLD_KUBELET_FLAGS = {"--network-plugin": 24, "--container-runtime": 27, "--pod-infra-container-image": 35}
NEW_KUBELET_FIELDS = {"containerRuntimeEndpoint": 27, "failCgroupV1": 31}


def assets(folder: Path, minor: int, *names: str) -> None:
    """Stand-ins that know their version, as `--version` prints it."""
    for name in names:
        path = folder / name
        path.write_text(f"#!/bin/sh\necho Kubernetes v1.{minor}.3\n")
        path.chmod(0o755)


@pytest.mark.parametrize("minor", [20, 23, 24, 26, 27, 31, 34, 35])
def test_kubelet_gets_only_what_its_version_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minor: int) -> None:
    assets(tmp_path, minor, "kubelet")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    flags = {str(word).partition("=")[0] for word in node_main.kubelet_command(SPEC)}
    for flag, removed_in in OLD_KUBELET_FLAGS.items():
        assert (flag in flags) == (minor < removed_in), flag
    for field, added_in in NEW_KUBELET_FIELDS.items():
        assert (field in node_main.kubelet_config(SPEC)) == (minor >= added_in), field


@pytest.mark.parametrize(("minor", "plain_port"), [(20, True), (23, True), (24, False), (34, False)])
def test_managers_of_old_versions_are_told_to_close_their_plain_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minor: int, plain_port: bool
) -> None:
    assets(tmp_path, minor, "kube-controller-manager", "kube-scheduler")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    started: dict[str, tuple[str, ...]] = {}
    monkeypatch.setattr(ControlPlane, "_start", lambda _, name, *flags: started.__setitem__(name, flags))
    plane = ControlPlane("id", tmp_path)
    plane.start_controller_manager()
    plane.start_scheduler()
    assert {name: "--port=0" in flags for name, flags in started.items()} == {
        "kube-controller-manager": plain_port,
        "kube-scheduler": plain_port,
    }


def test_assets_come_first_and_the_build_fills_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets(tmp_path, 34, "kube-apiserver", "etcd")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    monkeypatch.setattr(kubernetes, "build_dir", lambda: tmp_path / "built")
    (tmp_path / "built").mkdir()
    assets(tmp_path / "built", 20, "kube-apiserver", "kubelet")
    assert kubernetes.binary("kube-apiserver") == tmp_path / "kube-apiserver"
    assert kubernetes.binary("etcd") == tmp_path / "etcd"
    assert kubernetes.minor(kubernetes.binary("kubelet")) == 20


def test_a_missing_daemon_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setattr(kubernetes, "build_dir", lambda: tmp_path)
    with pytest.raises(HarnessError, match=r"kubelet: not in .*; run `python -m ivft_cluster setup`"):
        kubernetes.binary("kubelet")

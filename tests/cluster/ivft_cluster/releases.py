"""The Kubernetes releases that the cluster can run, and the paths of their programs.

`KUBERNETES=1.34` in the environment picks another release than the default.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ivft_cluster.go_build import GoProgram
from ivft_cluster.shell import HarnessError

RELEASES = {"1.34": "1.34.4", "1.35": "1.35.4", "1.36": "1.36.3", "1.37": "1.37.2"}
FLOOR, *_, DEFAULT = sorted(RELEASES, key=lambda minor: [int(part) for part in minor.split(".")])  # oldest, newest
CONTROL_PLANE = ("kube-apiserver", "kube-controller-manager")
NODES = ("kube-scheduler", "kubelet", "kube-proxy")
STAND_INS = ("device-plugin", "logind")  # in the same binary as the daemons of nodes: see go/kubernetes

ETCD = GoProgram("etcd", "go.etcd.io/etcd/server/v3", "v3.6.16", {"etcd": "go.etcd.io/etcd/server/v3"})
_RUNTIME = "github.com/containerd/containerd/v2"
CONTAINERD = GoProgram(
    "containerd",
    _RUNTIME,
    "v2.4.2",
    {name: f"{_RUNTIME}/cmd/{name}" for name in ("containerd", "containerd-shim-runc-v2", "ctr")},
)
KUEUE = GoProgram("kueue", "sigs.k8s.io/kueue", "v0.17.0", {"manager": "sigs.k8s.io/kueue/cmd/kueue"})
GITOPS = GoProgram(
    "gitops",
    "sigs.k8s.io/cli-utils",
    "v0.37.2",
    {"gitops-health": "."},
    "gitops",
    also=("github.com/yuin/gopher-lua@v1.1.2",),
)
_KREW = "sigs.k8s.io/krew"
KREW = GoProgram("krew", _KREW, "v0.4.4", {name: f"{_KREW}/cmd/{name}" for name in ("krew", "validate-krew-manifest")})


def release() -> str:
    """The release in use, such as "1.37.2". Raises HarnessError for a release that is not in the table."""
    chosen = os.environ.get("KUBERNETES") or DEFAULT
    if chosen not in RELEASES:
        raise HarnessError(f"KUBERNETES: found {chosen!r}, expected one of {', '.join(RELEASES)}")
    return RELEASES[chosen]


def control_plane(version: str) -> GoProgram:
    """API server and controller manager of a release, in one binary."""
    return _daemons("control-plane", version, CONTROL_PLANE)


def nodes(version: str) -> GoProgram:
    """What a release needs to run pods, in one binary."""
    return _daemons("nodes", version, NODES + STAND_INS, ("nodes",))


def _daemons(name: str, version: str, links: tuple[str, ...], tags: tuple[str, ...] = ()) -> GoProgram:
    major, minor, _ = version.split(".")
    facts = {"gitVersion": f"v{version}", "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    package = "k8s.io/component-base/version"
    flags = tuple(f"-X {package}.{key}={value}" for key, value in facts.items())
    return GoProgram(
        f"kubernetes-{name}",
        "k8s.io/kubernetes",
        f"v{version}",
        {"kubernetes": "."},
        source="kubernetes",
        ldflags=flags,
        links=links,
        tags=tags,
    )


def programs() -> list[GoProgram]:
    """Programs of a cluster of the selected release; the largest first."""
    return [control_plane(release()), nodes(release()), CONTAINERD, ETCD]


def server_programs() -> list[GoProgram]:
    """Programs of an API server of the selected release, without nodes."""
    return [control_plane(release()), ETCD]


def extra_programs() -> tuple[GoProgram, ...]:
    """Additional programs for tests."""
    return (GITOPS, KREW, KUEUE)


def binary(name: str) -> Path:
    """Path of a built program, or of one from a package of the virtualenv (`kubectl`, `weed`).

    Raises HarnessError with the way to get it.
    """
    for program in (*programs(), *extra_programs()):
        if name in (*program.binaries, *program.links):
            path, hint = program.folder / name, "run `python -m ivft_cluster setup` (with tests/cluster on PYTHONPATH)"
            break
    else:
        path, hint = Path(sys.executable).parent / name, "install the project's dev group into the virtualenv"
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise HarnessError(f"{name}: not in {path.parent}; {hint}")
    return path

"""The Kubernetes binaries: built from Debian's source package, or taken from `KUBEBUILDER_ASSETS` where that has them.

`KUBEBUILDER_ASSETS` is controller-runtime envtest's convention: a folder with at least etcd, kube-apiserver and
kubectl. With it the same tests run against a current Kubernetes.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path

from ivft_cluster.paths import PACKAGE, cache_dir, content_hash, locked
from ivft_cluster.shell import HarnessError, run

RECIPE = (PACKAGE / "kubernetes_src/build.sh", PACKAGE / "kubernetes_src/main.go")
DAEMONS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")


def build_dir() -> Path:
    return cache_dir() / f"kubernetes-{content_hash(RECIPE)}"


def build() -> Path:
    """Build once (about three minutes on two cores); afterwards return at once.

    Raises HarnessError with the end of the build's log, which stays in the cache.
    """
    out = build_dir()
    if out.is_dir():
        return out
    with locked("kubernetes"):
        if out.is_dir():
            return out
        work, log = out.with_suffix(".work"), out.with_suffix(".log")
        shutil.rmtree(work, ignore_errors=True)
        run(["bash", RECIPE[0], work, work / "out"], log=log)
        (work / "out").rename(out)
        shutil.rmtree(work)
    return out


def binary(name: str) -> Path:
    """Path of `etcd`, `kubectl` or a daemon: from KUBEBUILDER_ASSETS, else the build, else the virtualenv.

    Raises HarnessError saying how to get it.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    candidates = [Path(assets) / name] if assets else []
    candidates += [build_dir() / name] if name in DAEMONS else [Path(sys.executable).parent / name]
    for path in candidates:
        if path.is_file() and os.access(path, os.X_OK):
            return path
    hint = (
        "run `python -m ivft_cluster setup` (with tests/cluster on PYTHONPATH)"
        if name in DAEMONS
        else "install the project's dev group into the virtualenv"
    )
    raise HarnessError(f"{name}: not in {', '.join(str(path.parent) for path in candidates)}; {hint}")


@cache
def minor(path: Path) -> int:
    """The y of the daemon's Kubernetes version 1.y, which decides the flags it takes."""
    shown = run([path, "--version"])
    if not (match := re.search(r"v1\.(\d+)\.", shown)):
        raise HarnessError(f"{path} --version said {shown.strip()!r}, expected 'Kubernetes v1.…'")
    return int(match[1])

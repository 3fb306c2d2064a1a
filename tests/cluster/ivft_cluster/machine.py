"""`setup`: installs or builds missing Debian packages, Go programs and images."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ivft_cluster import azurite, go_build, images, releases
from ivft_cluster.contexts import COMPONENTS
from ivft_cluster.go_build import GoProgram
from ivft_cluster.paths import locked
from ivft_cluster.shell import HarnessError, phase, run

DEBIAN_PACKAGES = (
    "buildah",
    "conntrack",
    "containernetworking-plugins",
    "dbus-daemon",
    "default-jre-headless",
    "gcc",
    "iproute2",
    "iptables",
    "libc6-dev",
    "mmdebstrap",
    "prometheus",
    "runc",
    "skopeo",
    "util-linux",
)
WAIT_FOR_LOCK = "DPkg::Lock::Timeout=600"
POLICY = Path("/usr/sbin/policy-rc.d")


def setup(*, tests: bool = True) -> None:
    """Prepare this machine to run a cluster; with `tests` also build programs that only tests use.

    A second call finds everything in place. Raises HarnessError when not root, or with the log of the step that failed.
    """
    require_root()
    with phase("Debian packages"):
        install_packages()
    wanted = (*releases.programs(), *(releases.extra_programs() if tests else ()))
    with ThreadPoolExecutor(3) as pool:  # compilers use the CPU, image builds mostly wait for archives and disks
        steps = [pool.submit(_build_programs, wanted), pool.submit(_build_images)]
        steps += [pool.submit(_install_azurite)] if tests else []
        for step in steps:
            step.result()


def setup_servers() -> None:
    """Prepare this machine to run API servers without nodes. Raises HarnessError."""
    require_root()
    with phase("Debian packages"):
        install_packages()
    _build_programs(releases.server_programs())


def _build_programs(programs: Iterable[GoProgram]) -> None:
    for program in programs:
        with phase(f"{program.name} {program.version}", live=False):
            program.build()
    go_build.remove_intermediates()


def _install_azurite() -> None:
    with phase(f"Azurite {azurite.VERSION}", live=False):
        azurite.install()


def _build_images() -> None:
    with phase("base and pause images", live=False):
        images.base_image()
        images.pause_image()
    for component in COMPONENTS:
        with phase(f"image of the {component}", live=False):
            images.component_image(component)


def require_root() -> None:
    if os.geteuid() != 0:
        raise HarnessError("the cluster needs root (network namespaces, mounts, cgroups): run it as root or with sudo")


def missing_packages() -> list[str]:
    query = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *DEBIAN_PACKAGES],
        capture_output=True,
        text=True,
    )
    installed = {line.split()[0] for line in query.stdout.splitlines() if line.endswith(" installed")}
    return [name for name in DEBIAN_PACKAGES if name not in installed]


def install_packages() -> None:
    if shutil.which("dpkg-query") is None:
        raise HarnessError("the cluster is made from Debian's packages: this machine has no dpkg")
    with locked("apt"):
        if not (missing := missing_packages()):
            return
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        with _no_daemons():
            run(["apt-get", "update", "-qq"], env=env)
            run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "-o", WAIT_FOR_LOCK, *missing], env=env)


@contextmanager
def _no_daemons() -> Iterator[None]:
    """Prevent packages from starting their services (containerd, Prometheus) during installation."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()

"""Disk space for builds and nodes: old builds make room, and too little space is an error before the work begins."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from ivft_cluster import oci
from ivft_cluster.contexts import COMPONENTS, wheelhouse_key
from ivft_cluster.oci import Image
from ivft_cluster.paths import cache_dir, locked
from ivft_cluster.shell import HarnessError

GIB = 2**30
# Measured for the trainer's image: wheels 3 GiB, buildah's layers 9 GiB, the image in the layout 6 GiB.
BUILD_BYTES = 20 * GIB
# A node stores each blob and its unpacked files: 13 GiB for images of 6.
NODE_COPIES = 2.2
SPARE_BYTES = 4 * GIB  # checkpoints, logs and etcd of a cluster under test


def require_for_build() -> None:
    """Make room for a build of the images. Raises HarnessError when the disk stays too full."""
    _require(BUILD_BYTES, "new images")


def require_for_nodes(images: Iterable[Image], nodes: int) -> None:
    """Make room for images that each of `nodes` nodes lacks. Raises HarnessError when the disk stays too full."""
    sizes = {blob["digest"]: blob["size"] for image in images for blob in image.descriptors()}
    if missing := sum(sizes.values()):
        _require(round(missing * NODE_COPIES * nodes) + SPARE_BYTES, f"the images of {nodes} nodes")


def _require(needed: int, purpose: str) -> None:
    if _free() < needed:
        _remove_old_builds()
    if (free := _free()) < needed:
        raise HarnessError(
            f"{purpose} take {needed / GIB:.0f} GiB, found {free / GIB:.0f} GiB free under {cache_dir()}: "
            "free space, remove that folder's `nodes` while no cluster runs, or set XDG_CACHE_HOME to a larger disk"
        )


def _remove_old_builds() -> None:
    """Remove earlier wheelhouses and image builds, and buildah's layers, which only make the next build faster."""
    current = {f"{component}-{wheelhouse_key(component)}" for component in COMPONENTS}
    for folder in (cache_dir() / "wheelhouses").glob("*"):
        if folder.is_dir() and folder.name not in current:
            shutil.rmtree(folder, ignore_errors=True)
    oci.prune(kept_builds=1)
    with locked("build-operator"), locked("build-trainer"):
        shutil.rmtree(cache_dir() / "buildah", ignore_errors=True)


def _free() -> int:
    return shutil.disk_usage(cache_dir()).free

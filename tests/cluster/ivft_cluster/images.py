"""The images pods run: a pause image, a Debian base, and builds of the project's own Dockerfiles."""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

from ivft_cluster.node import PAUSE_IMAGE
from ivft_cluster.oci import Image, write_archive
from ivft_cluster.paths import PACKAGE, cache_dir, content_hash, locked
from ivft_cluster.shell import run

BASE_IMAGE = "localhost/base:bookworm"
BASE_PACKAGES = ("ca-certificates", "python3", "python3-venv")
# What a container never reads.
UNUSED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/var/lib/apt/lists/*", "/var/cache/apt/*")


def image_dir() -> Path:
    path = cache_dir() / "images"
    path.mkdir(exist_ok=True)
    return path


def pause_image() -> Image:
    """The image that holds a pod's namespaces: one static binary of ours."""
    source = PACKAGE / "pause.c"
    image = Image(PAUSE_IMAGE, image_dir() / f"pause-{content_hash([source])}.tar")
    with locked("pause"):
        if not image.archive.exists():
            with tempfile.TemporaryDirectory() as scratch:
                binary, layer = Path(scratch) / "pause", Path(scratch) / "layer.tar"
                run(["gcc", "-static", "-Os", "-s", "-o", binary, source])
                with tarfile.open(layer, "w") as tar:
                    tar.add(binary, "pause", filter=_reproducible)
                write_archive(image, [layer], {"Entrypoint": ["/pause"]})
    return image


def base_image() -> Image:
    """Debian bookworm with its Python 3.11, made by mmdebstrap from the archives this machine's apt uses."""
    recipe = ["mmdebstrap", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}"]
    recipe += [f"--customize-hook=rm -rf \"$1\"{pattern}" for pattern in UNUSED]
    image = Image(BASE_IMAGE, image_dir() / f"base-{content_hash(recipe)}.tar")
    with locked("base"):
        if not image.archive.exists():
            layer = base_layer(image)
            sources = run(
                ["apt-get", "indextargets", "--format", "deb $(SITE) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
                + ["Origin: Debian"]
            )
            log = image.archive.with_suffix(".log")
            run([*recipe, "bookworm", layer, "-"], input=sources, log=log)
            write_archive(image, [layer], {"Cmd": ["/bin/bash"]})
    return image


def base_layer(base: Image) -> Path:
    """The root file system of the base image as a plain tar, kept for builds."""
    return base.archive.with_suffix(".root.tar")


def _reproducible(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member

"""Images for pods: a pause image, a Debian base, and builds of the project's Dockerfiles."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ivft_cluster import disk
from ivft_cluster.contexts import COMPONENTS, context_hash, stage_context
from ivft_cluster.oci import Image, add_image, layout, prune
from ivft_cluster.paths import PACKAGE, cache_dir, content_hash, locked
from ivft_cluster.shell import HarnessError, run

BASE_PACKAGES = ("ca-certificates", "default-jre-headless", "python3", "python3-venv")
# Paths that containers never read.
UNUSED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/var/lib/apt/lists/*", "/var/cache/apt/*")
# The storage library leaves its folder mounted, so run it in a mount namespace that ends with the command.
OWN_MOUNTS = ("unshare", "--mount", "--propagation=private", "--")
# The base has Java, and a build has no network to install more.
_BUILD_ARGUMENTS = {"trainer": {"APT_PACKAGES": ""}}
PAUSE_SOURCE = PACKAGE / "pause.c"


def pause_image() -> Image:
    """The pause image, which holds a pod's namespaces: one static binary."""
    image = Image(f"localhost/pause:{content_hash([PAUSE_SOURCE])}")
    with locked("pause"):
        if not image.exists():
            with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
                binary, layer = Path(scratch) / "pause", Path(scratch) / "layer.tar"
                run(["gcc", "-static", "-Os", "-s", "-o", binary, PAUSE_SOURCE])
                with tarfile.open(layer, "w") as tar:
                    tar.add(binary, "pause", filter=_reproducible)
                add_image(image.name, [layer], {"Entrypoint": ["/pause"]})
    return image


def base_image() -> Image:
    """Debian bookworm with Python 3.11 and Java, made by mmdebstrap from the archives this machine's apt uses.

    The trainer scores captions with Java programs; a build has no network to get a runtime from.
    """
    recipe = ["mmdebstrap", "--variant=minbase", "--format=tar", f"--include={','.join(BASE_PACKAGES)}"]
    recipe += [f'--customize-hook=rm -rf "$1"{pattern}' for pattern in UNUSED]
    image = Image("localhost/base:bookworm")
    stamp = cache_dir() / f"base-{content_hash(recipe)}.log"
    with locked("base"):
        if not (image.exists() and stamp.exists()):
            targets = ["apt-get", "indextargets", "Created-By: Packages", "Origin: Debian"]
            sources = run([*targets, "--format", "deb $(SITE) $(RELEASE) $(COMPONENT)"])
            with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
                log, layer = Path(scratch) / "log", Path(scratch) / "debian-bookworm.tar"
                run([*recipe, "bookworm", layer, "-"], input=sources, log=log)
                add_image(image.name, [layer], {"Cmd": ["/bin/bash"]})
                log.rename(stamp)
    return image


def component_image(component: str, build_args: Mapping[str, str] | None = None) -> Image:
    """The image of `operator` or `trainer` as the checkout is now; built only when something in it has changed.

    Its tag is the hash of everything that went in, so a pod that names it never gets an older build.
    Raises HarnessError when a build fails or the disk has no room for it.
    """
    base, arguments = base_image(), {**_BUILD_ARGUMENTS.get(component, {}), **(build_args or {})}
    key = content_hash([context_hash(component), base.digest, repr(sorted(arguments.items()))])
    image = Image(f"localhost/internvl-{component}:{key}")
    if not image.exists():
        disk.require_for_build()
    with locked(f"build-{component}"):
        if not image.exists():
            context = stage_context(component)
            build(context / COMPONENTS[component] / "Dockerfile", context, image.name, arguments, base)
            prune()
    return image


def build(
    dockerfile: Path, context: Path, name: str, build_args: Mapping[str, str] | None = None, base: Image | None = None
) -> Image:
    """Build a Dockerfile with Debian's buildah and put the result into the layout.

    `base` becomes the build argument BASE_IMAGE. Raises HarnessError with the end of the build's output.
    """
    arguments = dict(build_args or {})
    if base:
        arguments["BASE_IMAGE"] = _base_in_buildah(base)
    pairs = [word for key, value in sorted(arguments.items()) for word in ("--build-arg", f"{key}={value}")]
    log = cache_dir() / f"build-{name.replace('/', '-').partition(':')[0]}.log"
    _buildah("build", "--layers", "--pull-never", "--file", dockerfile, "--tag", name, *pairs, context, log=log)
    with locked("images"):
        copy = [*OWN_MOUNTS, "skopeo", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers"]
        run([*copy, _in_storage(name), f"oci:{layout()}:{name}"])
    return Image(name)


def _base_in_buildah(base: Image) -> str:
    """Buildah's name for the base image; it contains the digest, so a new base has a new name."""
    name = f"{base.name.rpartition(':')[0]}:{base.digest[7:19]}"
    if name not in _buildah("images", "--format", "{{.Name}}:{{.Tag}}").split():
        run([*OWN_MOUNTS, "skopeo", "copy", "--quiet", f"oci:{layout()}:{base.name}", _in_storage(name)])
    return name


def _in_storage(name: str) -> str:
    return f"containers-storage:[overlay@{_storage()}/storage+{_storage()}/run]{name}"


def _storage() -> Path:
    return cache_dir() / "buildah"


def _buildah(*arguments: str | Path, log: Path | None = None) -> str:
    if not shutil.which("buildah"):
        raise HarnessError("buildah is not installed: run `python -m ivft_cluster setup`")
    env = {**os.environ, "BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "overlay"}
    return run(
        [*OWN_MOUNTS, "buildah", "--root", _storage() / "storage", "--runroot", _storage() / "run", *arguments],
        env=env,
        log=log,
    )


def _reproducible(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member

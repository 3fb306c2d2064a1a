"""OCI images: one layout folder in the cache holds all images by blob; nodes get only the blobs they lack.

Layers stay uncompressed: they never leave this machine, and unpacking is most of an import's time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ivft_cluster.paths import cache_dir, locked
from ivft_cluster.releases import binary
from ivft_cluster.shell import HarnessError, run

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
REFERENCE = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"
CONTAINERD = "/run/containerd/containerd.sock"
OWN_IMAGES = "localhost/internvl-"
KEPT_BUILDS = 3
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
Json = dict[str, Any]


@dataclass(frozen=True)
class Image:
    """An image in the layout; pods use its `name` (`localhost/base:bookworm`)."""

    name: str

    @property
    def digest(self) -> str:
        """`sha256:…` of its manifest. Raises HarnessError when the layout has no such image."""
        return str(self._entry()["digest"])

    def exists(self) -> bool:
        return any(_name(entry) == self.name for entry in _index())

    def descriptors(self) -> list[Json]:
        """Manifest, config and layers, as OCI descriptors."""
        entry = self._entry()
        manifest = json.loads(blob_path(entry["digest"]).read_bytes())
        return [entry, manifest["config"], *manifest["layers"]]

    def _entry(self) -> Json:
        for entry in _index():
            if _name(entry) == self.name:
                return entry
        known = ", ".join(sorted(map(_name, _index()))) or "none"
        raise HarnessError(f"no image {self.name!r} was built; there are: {known}")


def layout() -> Path:
    """The layout folder, made if absent (OCI image-spec, image-layout.md)."""
    path = cache_dir() / "images"
    if not (path / "index.json").exists():
        (path / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        _write_index([])
    return path


def blob_path(digest: str) -> Path:
    return layout() / "blobs/sha256" / digest.removeprefix("sha256:")


def add_image(name: str, layers: Sequence[Path], config: Mapping[str, Any]) -> Image:
    """Put an image of uncompressed layer tars into the layout; the layer files are moved there."""
    layer_descriptors = [_keep_file(path) for path in layers]
    body = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": [PATH], **config},
        "rootfs": {"type": "layers", "diff_ids": [each["digest"] for each in layer_descriptors]},
        "history": [{"created_by": path.name} for path in layers],  # buildah requires one for each layer
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _keep_bytes(CONFIG, _dump(body)),
        "layers": layer_descriptors,
    }
    entry = {**_keep_bytes(MANIFEST, _dump(manifest)), "annotations": {REFERENCE: name}}
    with locked("images"):
        _write_index([each for each in _index() if _name(each) != name] + [entry])
    return Image(name)


def prune(kept_builds: int = KEPT_BUILDS) -> None:
    """Keep the newest builds of each of the project's images, and delete unreferenced blobs."""
    with locked("images"):
        kept: list[Json] = []
        for entry in reversed(_index()):
            repository = _name(entry).rpartition(":")[0]
            builds = sum(_name(each).rpartition(":")[0] == repository for each in kept)
            if not repository.startswith(OWN_IMAGES) or builds < kept_builds:
                kept.insert(0, entry)
        _write_index(kept)
        used = {each["digest"] for entry in kept for each in Image(_name(entry)).descriptors()}
        for blob in (layout() / "blobs/sha256").iterdir():
            if f"sha256:{blob.name}" not in used:
                blob.unlink()


def import_images(node: Sequence[str], images: Iterable[Image]) -> list[str]:
    """Load images into the containerd that the command prefix `node` reaches; returns the names imported.

    An image whose name already stands for the same digest is left alone; of another, only missing blobs are sent.
    """
    ctr = [*node, binary("ctr"), "--address", CONTAINERD, "--namespace", "k8s.io"]
    missing = missing_images(node, images)
    if missing:
        blobs = set(run([*ctr, "content", "list", "--quiet"]).split())
        _feed([*ctr, "images", "import", "-"], lambda pipe: write_archive(pipe, missing, without=blobs))
    return [image.name for image in missing]


def missing_images(node: Sequence[str], images: Iterable[Image]) -> list[Image]:
    """Images that the containerd which the command prefix `node` reaches does not have as they are in the layout."""
    present = _present([*node, binary("ctr"), "--address", CONTAINERD, "--namespace", "k8s.io"])
    return [image for image in images if present.get(image.name) != image.digest]


def import_archives(node: Sequence[str], archives: Iterable[Path]) -> None:
    """Load any OCI or Docker image archives."""
    for archive in archives:
        run([*node, binary("ctr"), "--address", CONTAINERD, "--namespace", "k8s.io", "images", "import", archive])


def forget_pruned(node: Sequence[str]) -> None:
    """Remove from containerd, under every name, the project's images that the layout no longer has."""
    ctr = [*node, binary("ctr"), "--address", CONTAINERD, "--namespace", "k8s.io"]
    known = {_name(entry) for entry in _index()}
    present = _present(ctr)
    old = {digest for name, digest in present.items() if name.startswith(OWN_IMAGES) and name not in known}
    if names := [name for name, digest in present.items() if digest in old]:
        run([*ctr, "images", "delete", "--sync", *names])


def write_archive(sink: IO[bytes], images: Sequence[Image], without: Collection[str] = ()) -> None:
    """Write images as an OCI archive, leaving out the blobs in `without` (digests)."""
    with tarfile.open(fileobj=sink, mode="w|") as tar:
        entries = [{**image.descriptors()[0], "annotations": {CONTAINERD_NAME: image.name}} for image in images]
        _add_bytes(tar, "oci-layout", (layout() / "oci-layout").read_bytes())
        _add_bytes(tar, "index.json", _dump({"schemaVersion": 2, "manifests": entries}))
        digests = {each["digest"]: None for image in images for each in image.descriptors()}
        for digest in [digest for digest in digests if digest not in without]:
            path = blob_path(digest)
            with path.open("rb") as file:
                member = tarfile.TarInfo("blobs/" + digest.replace(":", "/"))
                member.size = path.stat().st_size
                tar.addfile(member, file)


def _feed(argv: Sequence[str], write: Callable[[IO[bytes]], None]) -> None:
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; its own message says why
            write(process.stdin)
        _, errors = process.communicate()
    if process.returncode:
        raise HarnessError(f"ctr images import: {errors.decode().strip()}")


def _present(ctr: Sequence[str]) -> dict[str, str]:
    rows = [line.split() for line in run([*ctr, "images", "list"]).splitlines()[1:]]
    return {row[0]: row[2] for row in rows}


def _index() -> list[Json]:
    return list(json.loads((layout() / "index.json").read_bytes())["manifests"])


def _write_index(entries: list[Json]) -> None:
    folder = cache_dir() / "images"
    partial = folder / "index.partial"
    partial.write_bytes(_dump({"schemaVersion": 2, "manifests": entries}))
    partial.rename(folder / "index.json")


def _name(entry: Json) -> str:
    return str(entry.get("annotations", {}).get(REFERENCE, ""))


def _keep_bytes(media_type: str, data: bytes) -> Json:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    blob_path(digest).write_bytes(data)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def _keep_file(path: Path) -> Json:
    with path.open("rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    shutil.move(path, blob_path(digest))
    return {"mediaType": LAYER, "digest": digest, "size": blob_path(digest).stat().st_size}


def _dump(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))

"""OCI image archives: written from layers, read for what they hold, loaded into a node's containerd.

Layers stay uncompressed: they are read on the machine that wrote them, and unpacking is most of an import's time.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivft_cluster.shell import HarnessError, run

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
CONTAINERD_NAME = "io.containerd.image.name"
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Image:
    """A named image in an OCI archive; `name` is what a pod says."""

    name: str
    archive: Path

    @property
    def digest(self) -> str:
        """`sha256:…` of its manifest. Raises HarnessError when the archive is no OCI archive."""
        return named_digests(self.archive)[self.name]


def named_digests(archive: Path) -> dict[str, str]:
    try:
        with tarfile.open(archive) as tar:
            member = tar.extractfile("index.json")
            index = json.load(member) if member else {}
        manifests = index["manifests"]
        return {each["annotations"][CONTAINERD_NAME]: each["digest"] for each in manifests}
    except (KeyError, tarfile.TarError, json.JSONDecodeError) as error:
        raise HarnessError(
            f"{archive}: not an OCI archive with image names ({error!r}); make it with ivft_cluster.images"
        ) from error


def write_archive(image: Image, layers: Sequence[Path], config: Mapping[str, Any] | None = None) -> None:
    """Write uncompressed layer tars and a config (`Entrypoint`, `Env`, …) as `image.archive`, atomically."""
    descriptors = [_describe(LAYER, path) for path in layers]
    body = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": [PATH], **(config or {})},
        "rootfs": {"type": "layers", "diff_ids": [each["digest"] for each in descriptors]},
    }
    config_bytes = _json(body)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _describe(CONFIG, config_bytes),
        "layers": descriptors,
    }
    write_layout(image, _json(manifest), [config_bytes, *layers])


def write_layout(image: Image, manifest: bytes, blobs: Sequence[bytes | Path]) -> None:
    """Write a manifest and the blobs it names as `image.archive`, atomically."""
    entry = {**_describe(MANIFEST, manifest), "annotations": {CONTAINERD_NAME: image.name}}
    partial = image.archive.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        # The index first: whoever asks what is inside need not read through a gigabyte.
        _add(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _add(tar, "index.json", _json({"schemaVersion": 2, "manifests": [entry]}))
        for blob in (manifest, *blobs):
            _add(tar, "blobs/sha256/" + _describe("", blob)["digest"].removeprefix("sha256:"), blob)
    partial.rename(image.archive)


def import_missing(node: Sequence[str], archives: Sequence[Path]) -> list[str]:
    """Load archives into the containerd that the command prefix `node` reaches; returns the names imported.

    An image whose name already stands for the same digest is left alone.
    """
    from ivft_cluster.node import CONTAINERD

    ctr = [*node, "ctr", "--address", CONTAINERD, "--namespace", "k8s.io", "images"]
    present = dict(line.split()[:3:2] for line in run([*ctr, "list"]).splitlines()[1:])
    imported = []
    for archive in archives:
        wanted = named_digests(archive)
        if any(present.get(name) != digest for name, digest in wanted.items()):
            run([*ctr, "import", archive])
            imported += wanted
    return imported


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _describe(media_type: str, blob: bytes | Path) -> dict[str, Any]:
    if isinstance(blob, bytes):
        return {
            "mediaType": media_type,
            "digest": f"sha256:{hashlib.sha256(blob).hexdigest()}",
            "size": len(blob),
        }
    with blob.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": blob.stat().st_size}


def _add(tar: tarfile.TarFile, name: str, blob: bytes | Path) -> None:
    member = tarfile.TarInfo(name)
    if isinstance(blob, bytes):
        member.size = len(blob)
        tar.addfile(member, io.BytesIO(blob))
    else:
        member.size = blob.stat().st_size
        with blob.open("rb") as file:
            tar.addfile(member, file)

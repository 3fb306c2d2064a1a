"""The image layout in the cache: what is kept, what is sent to a node."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from ivft_cluster import contexts, oci
from ivft_cluster.oci import Image, add_image
from ivft_cluster.shell import HarnessError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def layer(folder: Path, content: str) -> Path:
    path = folder / "layer.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("file")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content.encode()))
    return path


def blobs() -> set[str]:
    return {path.name for path in (oci.layout() / "blobs/sha256").iterdir()}


def archived(*images: Image, without: set[str] = frozenset()) -> dict[str, bytes]:  # type: ignore[assignment]
    sink = io.BytesIO()
    oci.write_archive(sink, images, without)
    sink.seek(0)
    with tarfile.open(fileobj=sink) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_an_archive_names_its_image_and_holds_every_blob_it_refers_to(own_cache: Path) -> None:
    image = add_image("localhost/one:1", [layer(own_cache, "a")], {"Cmd": ["x"]})
    files = archived(image)
    (entry,) = json.loads(files["index.json"])["manifests"]
    assert entry["annotations"]["io.containerd.image.name"] == "localhost/one:1"
    wanted = {each["digest"].replace(":", "/") for each in image.descriptors()}
    assert {f"blobs/{name}" for name in wanted} <= files.keys()


def test_blobs_a_node_has_are_not_sent_again(own_cache: Path) -> None:
    image = add_image("localhost/one:1", [layer(own_cache, "a")], {})
    _, _, big = image.descriptors()
    files = archived(image, without={big["digest"]})
    assert f"blobs/{big['digest'].replace(':', '/')}" not in files


def test_pruning_keeps_the_newest_builds_and_everything_that_is_not_a_build(own_cache: Path) -> None:
    for number in range(5):
        add_image(f"localhost/internvl-operator:{number}", [layer(own_cache, str(number))], {})
    add_image("localhost/base:bookworm", [layer(own_cache, "base")], {})
    before = blobs()
    oci.prune()
    assert not Image("localhost/internvl-operator:1").exists()
    assert Image("localhost/internvl-operator:2").exists()
    assert Image("localhost/base:bookworm").exists()
    assert blobs() < before
    for number in (2, 3, 4):
        assert archived(Image(f"localhost/internvl-operator:{number}"))


def test_an_unknown_image_is_named_with_those_that_exist(own_cache: Path) -> None:
    add_image("localhost/one:1", [layer(own_cache, "a")], {})
    with pytest.raises(HarnessError, match=r"no image 'localhost/two:1' was built; there are: localhost/one:1"):
        _ = Image("localhost/two:1").digest


def test_a_context_holds_only_files_that_git_does_not_ignore() -> None:
    names = {path.relative_to(contexts.CHECKOUT).as_posix() for path in contexts.source_files("operator")}
    assert {"constraints.txt", "operator/Dockerfile", "crds/pyproject.toml"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("trainer_image/")]


def test_requirements_are_third_party_only() -> None:
    assert "trainer_image/requirements-torch.txt" in contexts.requirements("trainer")
    required = contexts.requirements("operator")
    assert any(name.startswith("kopf") for name in required)
    assert any(name.startswith("setuptools") for name in required)
    assert not [name for name in required if name.startswith("internvl")]

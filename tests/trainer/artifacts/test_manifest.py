"""No manifest, no artifact: it comes last, and it tells when something under it changed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from internvl_trainer.artifacts.manifest import (
    ManifestError,
    check_sizes,
    commit,
    discard,
    fetch_files,
    read_manifest,
    upload_files,
)
from internvl_trainer.artifacts.storage import Storage

CONTENT = {"a.txt": b"alpha", "deep/b.bin": b"\0" * 1000}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "made"
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return {name: folder / name for name in CONTENT}


def test_a_manifest_says_size_and_sha256(storage: Storage, files: dict[str, Path], tmp_path: Path) -> None:
    commit(storage, "out", upload_files(storage, "out", files), "print", step=3)
    manifest = read_manifest(storage, "out")
    assert manifest is not None
    assert (manifest.fingerprint, manifest.extra) == ("print", {"step": 3})
    assert {file.path: (file.size, file.sha256) for file in manifest.files} == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in CONTENT.items()
    }
    assert manifest.sha256 == hashlib.sha256(storage.read("out/manifest.json")).hexdigest()
    check_sizes(storage, "out", manifest)
    fetch_files(storage, "out", manifest.files, tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_bytes() for name in CONTENT} == CONTENT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"alphA", "has sha256", id="another content of the same size"),
        pytest.param(b"alp", "has 3 bytes, its manifest says 5", id="cut short"),
        pytest.param(None, "is absent, its manifest says 5", id="absent"),
    ],
)
def test_a_changed_file_is_found(
    storage: Storage, files: dict[str, Path], tmp_path: Path, data: bytes | None, message: str
) -> None:
    manifest = commit(storage, "out", upload_files(storage, "out", files), "print")
    storage.delete("out/a.txt")
    if data is not None:
        storage.write("out/a.txt", data)

    def check() -> None:
        check_sizes(storage, "out", manifest)
        fetch_files(storage, "out", manifest.files, tmp_path / "back")

    with pytest.raises(ManifestError, match=message) as caught:
        check()
    assert f"{storage.uri}/out/a.txt" in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"files": [{"name": 1}]}', b"{}"])
def test_a_file_that_is_no_manifest_is_said_so(storage: Storage, text: bytes) -> None:
    storage.write("out/manifest.json", text)
    with pytest.raises(ManifestError, match="is not a manifest"):
        read_manifest(storage, "out")


_KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from internvl_trainer.artifacts.manifest import commit, upload_files
from internvl_trainer.artifacts.storage import open_storage
storage = open_storage(sys.argv[1], field="spec.output")
first = Path(sys.argv[2]) / "first"
first.write_bytes(b"1")
files = upload_files(storage, "out", {"first": first})
print("half way", flush=True)
sys.stdin.read()
commit(storage, "out", files, "print")
"""


def test_a_writer_that_is_killed_leaves_no_manifest(storage: Storage, tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", _KILLED_WRITER, storage.uri, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(os.environ),
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"half way\n"
    writer.kill()
    writer.wait()
    assert [file.key for file in storage.list()] == ["out/first"]
    assert read_manifest(storage, "out") is None


def test_discarding_takes_the_manifest_first(storage: Storage, files: dict[str, Path]) -> None:
    commit(storage, "out", upload_files(storage, "out", files), "print")
    deleted: list[str] = []
    delete = storage.delete
    storage.delete = lambda prefix: (deleted.append(prefix), delete(prefix))[1]  # type: ignore[method-assign]
    discard(storage, "out")
    assert deleted[0] == "out/manifest.json"
    assert list(storage.list()) == []

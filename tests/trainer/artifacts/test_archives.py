"""Archives as a data root: what is read, and what is refused without harm."""

from __future__ import annotations

import io
import multiprocessing
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from internvl_trainer.artifacts import archives, sources
from internvl_trainer.artifacts.media_listing import MediaFolder
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.errors import BadFile, UserError

MEMBERS = {"train/a.jpg": b"first picture", "train/deep/b.jpg": bytes(range(256)) * 100, "./c.png": b""}
KINDS = [pytest.param(kind, id=kind) for kind in ("zip", "tar", "tar.gz", "tgz")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    for cached in (sources._cache, sources._open, sources._archive):
        cached.cache_clear()
    yield
    sources._archive.cache_clear()


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, members: dict[str, bytes], *, gz: bool = False) -> Path:
    with tarfile.open(path, "w:gz" if gz else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write(kind: str, folder: Path, members: dict[str, bytes]) -> str:
    path = folder / f"images.{kind}"
    made = write_zip(path, members) if kind == "zip" else write_tar(path, members, gz=kind != "tar")
    return str(made)


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_read_by_their_relative_names(tmp_path: Path, kind: str) -> None:
    root = write(kind, tmp_path, MEMBERS)
    assert sources.open_media(root, "train/a.jpg") == b"first picture"
    assert sources.open_media(root, "./train/deep/b.jpg") == MEMBERS["train/deep/b.jpg"]
    assert sources.open_media(root, "c.png") == b""
    for absent in ("train/none.jpg", "tra", "a.jpg"):
        with pytest.raises(FileNotFoundError):
            sources.open_media(root, absent)
    with pytest.raises(MediaFolder) as found:
        sources.open_media(root, "train")
    assert found.value.files == ["train/a.jpg"]
    assert sources.open_media(f"{root}/train", "a.jpg") == b"first picture"
    assert sources.open_media(f"{root}/train/", "deep/b.jpg") == MEMBERS["train/deep/b.jpg"]


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_on_s3_is_downloaded_once(bucket: str, tmp_path: Path, kind: str) -> None:
    storage = open_storage(f"{bucket}/data", field="x")
    storage.upload(Path(write(kind, tmp_path, MEMBERS)), f"images.{kind}")
    root = f"{bucket}/data/images.{kind}"
    assert sources.open_media(root, "train/a.jpg") == b"first picture"
    storage.delete(f"images.{kind}")
    assert sources.open_media(root, "train/deep/b.jpg") == MEMBERS["train/deep/b.jpg"]


def test_a_folder_that_is_called_like_an_archive_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "images.zip").mkdir()
    (tmp_path / "images.zip" / "a.jpg").write_bytes(b"picture")
    assert sources.open_media(str(tmp_path / "images.zip"), "a.jpg") == b"picture"


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_leave_the_archive_cannot_be_asked_for(tmp_path: Path, kind: str) -> None:
    root = write(kind, tmp_path, {"../outside": b"x", "/etc/passwd": b"x", "a/../../b": b"x", "good.jpg": b"picture"})
    assert sources.open_media(root, "good.jpg") == b"picture"
    for name in ("../outside", "/etc/passwd", "a/../../b"):
        with pytest.raises(UserError, match="which leaves its root"):
            sources.open_media(root, name)
    for name in ("outside", "etc/passwd", "b"):
        with pytest.raises(FileNotFoundError):
            sources.open_media(root, name)
    assert not (tmp_path / "outside").exists()


def _linked_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("link.jpg")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")


def _linked_tar(path: Path, kind: bytes = tarfile.SYMTYPE) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("link.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)


def _hard_linked_tar(path: Path) -> None:
    _linked_tar(path, tarfile.LNKTYPE)


def _device_tar(path: Path) -> None:
    _linked_tar(path, tarfile.CHRTYPE)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        pytest.param("x.zip", _linked_zip, id="symlink in a zip"),
        pytest.param("x.tar", _linked_tar, id="symlink in a tar"),
        pytest.param("x.tar", _hard_linked_tar, id="hard link in a tar"),
        pytest.param("x.tar", _device_tar, id="device in a tar"),
    ],
)
def test_links_and_devices_are_refused(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / name)
    with pytest.raises(BadFile) as caught:
        sources.open_media(str(tmp_path / name), "link.jpg")
    assert caught.value.message == "link.jpg is a link or a device in its archive; store the file itself"


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_SUSPECT_SIZE", 1 << 20)
    root = str(write_zip(tmp_path / "x.zip", {"bomb.png": bytes(2 << 20)}))
    with pytest.raises(BadFile) as caught:
        sources.open_media(root, "bomb.png")
    assert caught.value.message.startswith("bomb.png unpacks from 20")
    assert caught.value.message.endswith(" to 2097152 bytes; is it a bomb?")


def test_a_packed_tar_that_is_a_bomb_fills_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_SUSPECT_SIZE", 1 << 20)
    root = str(write_tar(tmp_path / "x.tgz", {"bomb.png": bytes(64 << 20)}, gz=True))
    with pytest.raises(UserError) as caught:
        sources.open_media(root, "bomb.png")
    assert str(caught.value) == f"{root}: unpacks to over 200 times its size; is it a bomb?"
    assert list((tmp_path / "cache" / "entries").iterdir()) == []


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"a.jpg": b"picture"})
    data = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + flags] |= 1
    path.write_bytes(data)
    with pytest.raises(BadFile, match=r"a\.jpg is encrypted in its archive; store it without a password"):
        sources.open_media(str(path), "a.jpg")


def test_a_damaged_member_is_a_bad_file_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("bad.jpg", b"picture one")
        archive.writestr("good.jpg", b"picture two")
    path.write_bytes(path.read_bytes().replace(b"picture one", b"pictuRe one"))
    assert sources.open_media(str(path), "good.jpg") == b"picture two"
    with pytest.raises(BadFile, match=r"bad\.jpg cannot be unpacked \(Bad CRC-32 for file 'bad\.jpg'\)"):
        sources.open_media(str(path), "bad.jpg")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("x.zip", b"<html>", "cannot be read as an archive (File is not a zip file); ", id="page"),
        pytest.param("x.tar", b"<html>" * 100, "cannot be read as an archive (", id="page as tar"),
        pytest.param("x.tgz", b"<html>", "cannot be unpacked (Not a gzipped file (b'<h')); ", id="page as tgz"),
    ],
)
def test_a_file_that_is_no_archive_is_said_so(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        sources.open_media(str(tmp_path / name), "a.jpg")
    assert str(caught.value).startswith(f"{tmp_path / name}: {message}")
    assert str(caught.value).endswith("is it complete?")


def _read_all(root: str, names: list[str], failed: multiprocessing.Queue[str]) -> None:
    for _ in range(50):
        for name in names:
            if sources.open_media(root, name) != name.encode() * 1000:
                failed.put(name)
    failed.put("")


@pytest.mark.parametrize("kind", [pytest.param("zip", id="zip"), pytest.param("tar", id="tar")])
def test_forked_workers_do_not_disturb_each_other(tmp_path: Path, kind: str) -> None:
    names = [f"{number}.jpg" for number in range(20)]
    root = write(kind, tmp_path, {name: name.encode() * 1000 for name in names})
    sources.open_media(root, names[0])  # opened before the fork, as preflight in the same process does
    context = multiprocessing.get_context("fork")
    failed = context.Queue()
    processes = [context.Process(target=_read_all, args=(root, names, failed)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [failed.get(timeout=60) for _ in processes] == ["", ""]
    for process in processes:
        process.join()
    assert os.path.exists(root)

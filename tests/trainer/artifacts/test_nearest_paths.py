"""A wrong media path is answered with the path that was meant, at a bounded cost."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from internvl_api.address import Address
from internvl_trainer.artifacts import media_listing, sources
from internvl_trainer.artifacts.media_listing import MediaFolder, MediaMissing, NearestPaths, gbk_reading
from internvl_trainer.artifacts.storage import FolderStorage, StoredFile
from internvl_trainer.errors import AccessDenied, BadFile, UserError

CHINESE = "照片/一.jpg"
AS_CODE_PAGE_437 = CHINESE.encode("gbk").decode("cp437")


@pytest.mark.parametrize(
    ("paths", "wanted", "hint"),
    [
        pytest.param(
            ["photos/1.jpg"],
            "1.jpg",
            "found 'photos/1.jpg': if it is meant, set root to /data/ROOT/photos",
            id="a top folder",
        ),
        pytest.param(
            ["a/b/c/1.jpg"],
            "c/1.jpg",
            "found 'a/b/c/1.jpg': if it is meant, set root to /data/ROOT/a/b",
            id="two folders on top",
        ),
        pytest.param(
            ["1.jpg"],
            "train/1.jpg",
            "found '1.jpg': if it is meant, remove 'train/' from the paths",
            id="a folder more",
        ),
        pytest.param(
            ["1.jpg"],
            "ROOT/1.jpg",
            "found '1.jpg': if it is meant, set root to /data",
            id="the root's own name again",
        ),
        pytest.param(["1.JPG"], "1.jpg", "found '1.JPG', which differs in case or in how accents", id="case"),
        pytest.param(
            ["cafe\u0301.jpg"], "caf\u00e9.jpg", "found 'cafe\u0301.jpg', which differs in case", id="accents"
        ),
        pytest.param(["1.png"], "1.jpg", "found '1.png', which has another suffix", id="suffix"),
        pytest.param(
            [AS_CODE_PAGE_437],
            CHINESE,
            f"found {AS_CODE_PAGE_437!r}, which is {CHINESE!r} in GBK: pack the archive again with names in UTF-8",
            id="GBK",
        ),
        pytest.param(
            ["x/1.jpg", "train/y/1.jpg"], "train/z/1.jpg", "the nearest path is 'x/1.jpg'", id="another folder"
        ),
        pytest.param(["x/a/1.jpg", "y/b/1.jpg"], "z/b/1.jpg", "the nearest path is 'y/b/1.jpg'", id="most in common"),
        pytest.param(["2.jpg"], "1.jpg", "", id="nothing alike"),
    ],
)
def test_the_nearest_path(paths: list[str], wanted: str, hint: str) -> None:
    found = NearestPaths("/data/ROOT", paths).hint(wanted)
    assert found.startswith(f"; {hint}") if hint else found == ""


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5), min_size=1, max_size=6))
def test_every_chinese_name_of_an_archive_in_gbk_is_recognised(name: str) -> None:
    try:
        stored = f"{name}.jpg".encode("gbk").decode("cp437")
    except UnicodeError:
        return
    assert gbk_reading(stored) == f"{name}.jpg"
    assert repr(stored) in NearestPaths("x.zip", ["other.jpg", stored]).hint(f"{name}.jpg")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_root_of_either_kind_says_where_the_file_is_and_the_advice_works(tmp_path: Path, kind: str) -> None:
    root = tmp_path / f"media.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(root, "w") as archive:
            archive.writestr("photos/1.jpg", b"picture")
    else:
        (root / "photos").mkdir(parents=True)
        (root / "photos" / "1.jpg").write_bytes(b"picture")
    with pytest.raises(MediaMissing) as caught:
        sources.open_media(str(root), "1.jpg")
    advised = caught.value.hint.rpartition("set root to ")[2]
    assert advised == f"{root}/photos"
    assert sources.open_media(advised, "1.jpg") == b"picture"


def test_names_are_listed_once_for_any_number_of_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"picture")
    listed = []
    whole = media_listing.paths_below
    monkeypatch.setattr(sources, "paths_below", lambda root: listed.append(root) or whole(root))

    def miss(number: int) -> None:
        with pytest.raises(MediaMissing):
            sources.open_media(str(tmp_path), f"{number}.jpg")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(miss, range(50)))
    assert len(listed) == 1


def test_only_so_many_names_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_listing, "MOST_NAMES", 10)
    taken = []
    paths = (taken.append(number) or f"{number}.jpg" for number in range(1000))
    assert NearestPaths("/data", paths).hint("9.png")
    assert len(taken) <= 11


def test_a_loop_of_links_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for name in ("a", "a/1.jpg"):
        with pytest.raises(MediaMissing):
            sources.open_media(str(tmp_path), name)


def test_a_folder_is_not_followed_out_of_its_root(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "1.jpg").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(BadFile, match="a link that leaves"):
        sources.open_media(str(tmp_path / "root"), "link")
    with pytest.raises(MediaMissing) as missing:
        sources.open_media(str(tmp_path / "root"), "1.jpg")
    assert missing.value.hint == ""


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """A folder that stands for s3://bucket/data, and the prefixes that it was asked to list."""
    listed: list[str] = []

    class Listed(FolderStorage):
        def list(self, prefix: str = "") -> Iterator[StoredFile]:
            listed.append(prefix)
            return super().list(prefix)

        def read(self, key: str) -> bytes:
            if self.stat(key) is None:
                raise UserError("NotFound", f"found no object {key}")
            return super().read(key)

    storage = Listed(tmp_path / "bucket", field="data.root")
    (tmp_path / "bucket" / "photos").mkdir(parents=True)
    (tmp_path / "bucket" / "photos" / "1.jpg").write_bytes(b"picture")
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_open", lambda *_: storage)
    monkeypatch.setattr(sources, "open_storage", lambda *_, **__: storage)
    sources._cache.cache_clear()
    sources._nearest_paths.cache_clear()
    yield tmp_path / "bucket", listed
    sources._cache.cache_clear()
    sources._nearest_paths.cache_clear()


def test_a_bucket_has_folders_and_nearest_paths(bucket: tuple[Path, list[str]]) -> None:
    root = "s3://bucket/data/"
    with pytest.raises(MediaFolder) as folder:
        sources.open_media(root, "photos")
    assert folder.value.files == ["photos/1.jpg"]
    for name in ("1.jpg", "2.jpg", "1.jpg", "x" * 2000):
        with pytest.raises(MediaMissing) as missing:
            sources.open_media(root, name)
        hint = "; found 'photos/1.jpg': if it is meant, set root to s3://bucket/data/photos"
        assert missing.value.hint == (hint if name == "1.jpg" else "")
    assert bucket[1].count("") == 1  # the whole bucket, once


def test_a_bucket_that_must_not_be_listed_gives_no_hint(
    bucket: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AccessDenied("AccessDenied", "listing was refused")

    monkeypatch.setattr(FolderStorage, "list", refuse)
    assert sources.open_media("s3://bucket/data", "photos/1.jpg") == b"picture"
    with pytest.raises(MediaMissing) as missing:
        sources.open_media("s3://bucket/data", "photos/2.jpg")
    assert missing.value.hint == ""


@pytest.mark.parametrize(
    ("root", "archive", "folder"),
    [
        ("s3://bucket/a.zip", "s3://bucket/a.zip", ""),
        ("s3://bucket/a.zip/photos", "s3://bucket/a.zip", "photos/"),
        ("hf://datasets/owner/name@main/a.tar.gz/x/y/", "hf://datasets/owner/name@main/a.tar.gz", "x/y/"),
        ("https://host/a.zip?key=1", "https://host/a.zip?key=1", ""),
        ("https://host/a.zip/photos?key=1", "https://host/a.zip?key=1", "photos/"),
        ("s3://bucket/zips/photos", None, ""),
        ("s3://bucket.zip/photos", None, ""),
        ("s3://bucket.zip/a.tar/photos", "s3://bucket.zip/a.tar", "photos/"),
        ("https://host.zip/photos", None, ""),
        ("hf://datasets/owner/name.zip/photos", None, ""),
        ("hf://owner/name.zip/photos", None, ""),
        ("a.zip/photos", "a.zip", "photos/"),
    ],
)
def test_a_root_may_lead_into_an_archive(root: str, archive: str | None, folder: str) -> None:
    found = sources._place_in_archive(Address(root))
    assert found == (None if archive is None else (Address(archive), folder))

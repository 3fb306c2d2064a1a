"""Checkpoints, annotations and media from S3 and from disk; the cache they go through."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
from internvl_trainer.artifacts import sources
from internvl_trainer.artifacts.cache import Cache, digest_of
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.errors import UserError
from ivft_cluster.s3 import S3Server


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    sources._cache.cache_clear()
    sources._open.cache_clear()


@pytest.fixture
def model(bucket: str) -> str:
    """A checkpoint's URI; a pickle lies beside the weights."""
    storage = open_storage(f"{bucket}/model", field="spec.model.source")
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer/vocab.json"):
        storage.write(name, name.encode())
    return storage.uri


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.integration
def test_a_checkpoint_comes_without_pickles_and_only_once(model: str, s3_env: S3Server) -> None:
    folder = sources.fetch_directory(model, field="spec.model.source")
    assert names(folder) == ["config.json", "model.safetensors", "tokenizer/vocab.json"]
    written = (folder / "config.json").stat().st_mtime_ns
    again = sources.fetch_directory(model, field="spec.model.source")
    assert again == folder
    assert (folder / "config.json").stat().st_mtime_ns == written


@pytest.mark.integration
def test_preflight_takes_no_weights_but_sees_their_names(model: str) -> None:
    folder = sources.fetch_directory(model, field="spec.model.source", weights=False)
    assert names(folder) == ["config.json", "tokenizer/vocab.json"]
    assert "model.safetensors" in sources.list_sizes(model, field="spec.model.source")


@pytest.mark.integration
def test_a_changed_checkpoint_is_fetched_anew(model: str) -> None:
    before = sources.fetch_directory(model, field="spec.model.source")
    open_storage(model, field="x").write("config.json", b"changed")
    after = sources.fetch_directory(model, field="spec.model.source")
    assert (before / "config.json").read_bytes() == b"config.json"
    assert (after / "config.json").read_bytes() == b"changed"


@pytest.mark.integration
def test_files_and_media(bucket: str) -> None:
    storage = open_storage(f"{bucket}/data", field="x")
    storage.write("train.jsonl", b"{}\n")
    storage.write("images/a.jpg", b"picture")
    path = sources.fetch_file(f"{bucket}/data/train.jsonl", field="spec.data.train.x.annotation")
    assert path.read_bytes() == b"{}\n"
    assert sources.open_media(f"{bucket}/data", "images/a.jpg") == b"picture"
    storage.delete("images/a.jpg")
    assert sources.open_media(f"{bucket}/data/", "images/a.jpg") == b"picture"  # from the cache
    with pytest.raises(FileNotFoundError, match=r"images/b\.jpg"):
        sources.open_media(f"{bucket}/data", "images/b.jpg")


@pytest.mark.integration
def test_a_missing_annotation_names_field_and_uri(bucket: str) -> None:
    with pytest.raises(UserError) as caught:
        sources.fetch_file(f"{bucket}/data/none.jsonl", field="spec.data.train.coco.annotation")
    assert str(caught.value) == (
        f"spec.data.train.coco.annotation: found no object {bucket}/data/none.jsonl; check the URI"
    )


@pytest.mark.integration
def test_a_missing_checkpoint_names_field_and_uri(bucket: str) -> None:
    with pytest.raises(UserError) as caught:
        sources.fetch_directory(f"{bucket}/nothing", field="spec.model.source")
    assert str(caught.value) == f"spec.model.source: found no file under {bucket}/nothing; check the URI"


def test_media_on_disk_do_not_leave_their_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("secret")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "a.jpg").write_bytes(b"picture")
    assert sources.open_media(str(root), "./a.jpg") == b"picture"
    for path in ("../secret", "/etc/passwd", "link", "x/../../secret"):
        with pytest.raises(UserError, match="leaves"):
            sources.open_media(str(root), path)
    with pytest.raises(FileNotFoundError):
        sources.open_media(str(root), "absent.jpg")


def test_pvc_sources_are_mounted_under_pvc() -> None:
    with pytest.raises(UserError, match=r"found no file /pvc/claim/data/x\.jsonl"):
        sources.fetch_file("pvc://claim/data/x.jsonl", field="data")


def _make_slowly(root: str, counter: str) -> None:
    def make(folder: Path) -> None:
        with open(counter, "a") as file:
            file.write("made\n")
        time.sleep(0.2)  # so that the others come while it is being made
        (folder / "content").write_text("whole")

    entry = Cache(Path(root), 1 << 30).folder("one name", make)
    assert (entry / "content").read_text() == "whole"


def test_several_processes_make_an_entry_once(tmp_path: Path) -> None:
    arguments = str(tmp_path / "cache"), str(tmp_path / "counter")
    processes = [multiprocessing.Process(target=_make_slowly, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "counter").read_text() == "made\n"


def test_processes_that_found_no_entry_together_all_get_it_while_each_keeps_it(tmp_path: Path) -> None:
    """As the processes of a pod do: each looks at the same moment, and holds the entry until training ends."""
    looked = threading.Barrier(4)
    made: list[str] = []

    class Together(Cache):
        first = True

        def _is_there(self, entry: Path, descriptor: int) -> bool:
            found = super()._is_there(entry, descriptor)
            if self.first:
                self.first = False
                looked.wait(timeout=30)
            return found

    def make(folder: Path) -> None:
        made.append("made")
        (folder / "content").write_text("whole")

    caches = [Together(tmp_path, 1 << 30) for _ in range(4)]
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda cache=cache: found.append(cache.folder("name", make)), daemon=True)
        for cache in caches
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [(entry / "content").read_text() for entry in found] == ["whole"] * 4
    assert made == ["made"]


def test_an_entry_larger_than_the_cache_is_made_once(tmp_path: Path) -> None:
    made: list[str] = []

    def make(folder: Path) -> None:
        made.append("made")
        (folder / "weights").write_bytes(b"x" * 5000)

    entry = Cache(tmp_path, limit=1000).folder("model", make)
    assert (entry / "weights").stat().st_size == 5000
    assert made == ["made"]


def test_an_interrupted_download_goes_on(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 30)

    def breaks(folder: Path) -> None:
        (folder / "first").write_text("1")
        raise ConnectionError

    def goes_on(folder: Path) -> None:
        assert (folder / "first").read_text() == "1"
        (folder / "second").write_text("2")

    with pytest.raises(ConnectionError):
        cache.folder("name", breaks)
    assert names(cache.folder("name", goes_on)) == ["first", "second"]


def test_the_oldest_entries_make_room_and_used_folders_stay_uncounted(tmp_path: Path) -> None:
    """A model larger than the limit leaves the pictures their room."""
    cache = Cache(tmp_path, limit=1 << 30)
    held = cache.folder("model", lambda folder: (folder / "weights").write_bytes(b"x" * 4000))
    for number in range(6):
        cache.bytes_of(f"picture {number}", lambda: b"y" * 200)
    for age, entry in enumerate(sorted((tmp_path / "entries").iterdir(), key=lambda path: path != held)):
        os.utime(entry, (age, age))  # the folder is the oldest of all
    Cache(tmp_path, limit=1100).evict()
    assert (held / "weights").exists()
    left = [entry for entry in (tmp_path / "entries").iterdir() if entry != held]
    assert sorted(int(entry.stat().st_mtime) for entry in left) == [3, 4, 5, 6]  # 232 bytes each, with the sha256


def test_what_a_killed_download_left_goes_after_days_and_not_before(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 30)

    def breaks(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise ConnectionError

    for name in ("old", "new"):
        with pytest.raises(ConnectionError):
            cache.folder(name, breaks)
    long_ago = time.time() - 30 * 24 * 3600
    os.utime(tmp_path / "partial" / digest_of("old"), (long_ago, long_ago))
    cache.evict()
    assert [path.name for path in (tmp_path / "partial").iterdir()] == [digest_of("new")]


def test_the_cache_keeps_its_bound_by_itself(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=10_000)
    for number in range(100):
        assert cache.bytes_of(f"picture {number}", lambda: b"z" * 1000) == b"z" * 1000
    size = sum(path.stat().st_size for path in (tmp_path / "entries").iterdir())
    assert 5000 <= size <= 11_000

"""Links out of a root, files planted in a shared cache, and what of a base model is copied."""

from __future__ import annotations

from pathlib import Path

import pytest
from internvl_trainer.artifacts import sources
from internvl_trainer.artifacts.cache import Cache, open_cache
from internvl_trainer.artifacts.directory_download import has_small_files_of
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.errors import UserError
from internvl_trainer.model.convert_checkpoint import copy_files

FIELD = "spec.model.source"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the pod that is not in the checkpoint, like /proc/self/environ."""
    path = tmp_path / "environ"
    path.write_text("AWS_SECRET_ACCESS_KEY=hunter22")
    return path


@pytest.fixture
def base(tmp_path: Path, secret: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "LICENSE.txt").symlink_to(secret)
    return folder


def test_a_link_out_of_a_checkpoint_is_refused_before_anything_is_copied(base: Path, tmp_path: Path) -> None:
    for use in (
        lambda: sources.list_sizes(str(base), field=FIELD),
        lambda: sources.fetch_directory(str(base), field=FIELD, weights=False),
        lambda: sources.describe_directory(str(base), lambda _: True, field=FIELD),
        lambda: copy_files(base, tmp_path / "copied"),
    ):
        with pytest.raises(UserError, match=r"LICENSE\.txt is a link out of this folder; store the file itself"):
            use()
    copied = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(base)]
    assert [path.name for path in copied if "hunter22" in path.read_text()] == ["environ"]


@pytest.mark.parametrize("linked", ["LICENSE.txt", "folder/environ"])
def test_storage_reads_nothing_through_a_link_out_of_its_root(base: Path, secret: Path, linked: str) -> None:
    (base / "folder").symlink_to(secret.parent)
    storage = open_storage(str(base), field="spec.output")
    target = base.parent / "target"
    for use in (
        lambda: storage.stat(linked),
        lambda: storage.read(linked),
        lambda: storage.download(linked, target),
        lambda: storage.copy(linked, "copy"),
        lambda: storage.write(linked, b"written"),
    ):
        with pytest.raises(UserError, match="is a link out of this folder"):
            use()
    assert not target.exists()
    assert secret.read_text() == "AWS_SECRET_ACCESS_KEY=hunter22"


def test_links_within_a_root_and_a_snapshot_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--team--tiny"
    snapshot = repository / "snapshots" / "c0ffee"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "same.json").symlink_to("config.json")
    assert sources.list_sizes(str(snapshot), field=FIELD).keys() == {"config.json", "same.json"}
    assert sources.fetch_directory(str(snapshot), field=FIELD) == snapshot


def test_only_what_a_model_needs_is_copied_from_a_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    kept = ["config.json", "merges.txt", "tokenizer.model", "modeling_internvl_chat.py", "README.md", "LICENSE"]
    left = ["core.1234", "weights.bin", ".netrc", "notes.docx", "id_rsa", "backup/config.json"]
    for name in (*kept, *left):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    copy_files(base, tmp_path / "copied")
    assert sorted(path.name for path in (tmp_path / "copied").rglob("*")) == sorted(kept)


def cache_of_a_process(root: Path, namespace: str = "") -> Cache:
    return Cache(root, 1 << 30, namespace)


def make_config(folder: Path) -> None:
    (folder / "config.json").write_text("right")


def test_a_changed_entry_is_made_again(tmp_path: Path) -> None:
    entry = cache_of_a_process(tmp_path).folder("model", make_config)
    (entry / "config.json").write_text("wrong")
    (entry / "modeling.py").write_text("import os")
    again = cache_of_a_process(tmp_path).folder("model", make_config)
    assert {path.name: path.read_text() for path in again.iterdir()} == {"config.json": "right"}


def test_an_entry_that_was_planted_is_made_again(tmp_path: Path) -> None:
    cache = cache_of_a_process(tmp_path)
    planted = tmp_path / "entries" / cache._digest("model")
    planted.mkdir()
    (planted / "modeling.py").write_text("import os")
    assert [path.name for path in cache.folder("model", make_config).iterdir()] == ["config.json"]


def test_an_entry_planted_with_its_record_is_checked_against_the_source(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    (bucket / "config.json").write_text("right")
    storage = open_storage(str(bucket), field=FIELD)
    files = list(storage.list())

    def plant(folder: Path) -> None:
        (folder / "config.json").write_text("right")
        (folder / "modeling.py").write_text("import os")

    cache_of_a_process(tmp_path / "cache").folder("model", plant)
    found = cache_of_a_process(tmp_path / "cache").folder(
        "model", make_config, lambda folder: has_small_files_of(storage, files, folder)
    )
    assert [path.name for path in found.iterdir()] == ["config.json"]


def test_a_changed_picture_is_loaded_again(tmp_path: Path) -> None:
    cache = cache_of_a_process(tmp_path)
    assert cache.bytes_of("picture", lambda: b"right") == b"right"
    (path,) = (tmp_path / "entries").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert cache.bytes_of("picture", lambda: b"right") == b"right"
    assert cache.bytes_of("picture", lambda: b"never asked for") == b"right"


def test_namespaces_share_no_entry(tmp_path: Path) -> None:
    for namespace in ("team-a", "team-b"):
        cache = cache_of_a_process(tmp_path, namespace)
        assert cache.bytes_of("picture", namespace.encode) == namespace.encode()
        assert cache._digest("row") != cache_of_a_process(tmp_path)._digest("row")


@pytest.mark.parametrize("found", ["abc", "0", "-1", "100Gi", "nan", "1e3", ""])
def test_a_bound_of_the_cache_that_is_no_amount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path))
    monkeypatch.setenv("INTERNVL_CACHE_GIB", found)
    with pytest.raises(UserError) as caught:
        open_cache()
    assert str(caught.value) == (
        f"INTERNVL_CACHE_GIB: found {found!r}, expected GiB above 0, such as 100; correct it, or remove the variable"
    )

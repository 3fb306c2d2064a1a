"""Disk space for builds and nodes: what makes room, and what is refused before the work begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ivft_cluster import disk, oci
from ivft_cluster.contexts import wheelhouse_key
from ivft_cluster.disk import GIB
from ivft_cluster.oci import Image, add_image
from ivft_cluster.paths import cache_dir
from ivft_cluster.shell import HarnessError


@pytest.fixture(autouse=True)
def old_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache with two builds of an image, two wheelhouses, and buildah's layers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(2):
        layer = tmp_path / "layer"
        layer.write_text(str(number))
        add_image(f"localhost/internvl-trainer:{number}", [layer], {})
    for name in ("trainer-old", f"trainer-{wheelhouse_key('trainer')}"):
        (cache_dir() / "wheelhouses" / name).mkdir(parents=True)
    (cache_dir() / "buildah/storage").mkdir(parents=True)


def free_space(monkeypatch: pytest.MonkeyPatch, *free: float) -> None:
    """The disk has these GiB free, one figure for each look; the last one stays."""
    figures: Iterator[float] = iter(free)
    last = free[-1]
    monkeypatch.setattr(disk, "_free", lambda: round(next(figures, last) * GIB))


def test_a_disk_with_room_keeps_all_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    free_space(monkeypatch, 60)
    disk.require_for_build()
    assert Image("localhost/internvl-trainer:0").exists()
    assert (cache_dir() / "buildah").exists()
    assert (cache_dir() / "wheelhouses/trainer-old").exists()


def test_old_builds_make_room_and_current_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    free_space(monkeypatch, 9, 40)
    disk.require_for_build()
    assert not Image("localhost/internvl-trainer:0").exists()
    assert Image("localhost/internvl-trainer:1").exists()
    assert not (cache_dir() / "buildah").exists()
    assert [each.name for each in (cache_dir() / "wheelhouses").iterdir()] == [f"trainer-{wheelhouse_key('trainer')}"]


def test_a_disk_that_stays_full_is_refused_with_figures_and_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    free_space(monkeypatch, 9)
    with pytest.raises(HarnessError, match=r"take 20 GiB, found 9 GiB free under .*free space, .*XDG_CACHE_HOME"):
        disk.require_for_build()


def test_nodes_that_have_every_image_need_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    free_space(monkeypatch, 1)
    disk.require_for_nodes([], nodes=2)


def test_nodes_need_more_than_twice_the_bytes_of_each_blob_once(monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = [{"digest": "sha256:a", "size": 6 * GIB}, {"digest": "sha256:b", "size": GIB}]
    monkeypatch.setattr(oci.Image, "descriptors", lambda image: blobs)
    free_space(monkeypatch, 34)
    with pytest.raises(HarnessError, match=r"the images of 2 nodes take 35 GiB, found 34 GiB free"):
        disk.require_for_nodes([Image("one"), Image("two")], nodes=2)

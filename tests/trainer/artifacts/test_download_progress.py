"""What a download says about itself."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from internvl_trainer.artifacts import download_progress, sources
from internvl_trainer.artifacts.cache import Cache
from internvl_trainer.artifacts.download_progress import progress_text, told_to
from internvl_trainer.artifacts.storage import FolderStorage


@pytest.mark.parametrize(
    ("arrived", "total", "told"),
    [
        pytest.param(0, 0, "downloading s3://x: 0.0 kB", id="unknown-size"),
        pytest.param(0, 950, "downloading s3://x: 0.0 kB of 0.9 kB", id="tiny"),
        pytest.param(2_000, 4_100, "downloading s3://x: 2.0 kB of 4.1 kB", id="small"),
        pytest.param(5_000_000, 4_100_000, "downloading s3://x: 4.1 MB of 4.1 MB", id="other-files-beside-it"),
        pytest.param(1_500_000_000, 2_000_000_000, "downloading s3://x: 1.5 GB of 2.0 GB", id="large"),
    ],
)
def test_sizes_are_told_in_a_fitting_unit(arrived: int, total: int, told: str) -> None:
    assert progress_text("s3://x", arrived, total) == told


def test_a_process_that_waits_for_the_download_of_another_tells_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mostly another process of the node downloads the model; the first rank, which the operator asks, waits for it."""
    monkeypatch.setattr(download_progress, "_INTERVAL", 0.01)
    (tmp_path / "model").mkdir()
    for name, size in (("config.json", 2_000), ("model.safetensors", 3_000)):
        (tmp_path / "model" / name).write_bytes(b"x" * size)
    storage = FolderStorage(tmp_path / "model", field="spec.model.source")
    monkeypatch.setattr(sources, "_open", lambda uri, field: storage)
    monkeypatch.setattr(sources, "_cache", lambda: Cache(tmp_path / "cache", 1 << 30))
    half, whole = threading.Event(), threading.Event()

    def download(_: object, files: object, folder: Path) -> None:
        (folder / "config.json").write_bytes(b"x" * 2_000)
        half.set()
        assert whole.wait(30)
        (folder / "model.safetensors").write_bytes(b"x" * 3_000)

    monkeypatch.setattr(sources, "download_files", download)
    other = threading.Thread(target=sources.fetch_directory, args=("s3://models/x",), kwargs={"field": "f"})
    other.start()
    assert half.wait(30)
    told: list[str | None] = []

    def hear(text: str | None) -> None:
        told.append(text)
        whole.set()

    monkeypatch.setattr(download_progress, "_listeners", [])  # the other is a process of its own
    with told_to(hear):
        folder = sources.fetch_directory("s3://models/x", field="f")
    other.join()
    assert told[0] == f"downloading {storage.uri}: 2.0 kB of 5.0 kB"
    assert told[-1] is None
    assert (folder / "model.safetensors").stat().st_size == 3_000

"""The memory of the container that a worker reports, for the message when it is killed for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from internvl_trainer import metrics
from internvl_trainer.metrics import Reporter, container_memory, free_container_memory


@pytest.mark.parametrize(
    ("text", "used"),
    [
        pytest.param("anon 3000\nfile 9000\nkernel 50\nshmem 200\n", 3200, id="without-the-page-cache"),
        pytest.param("file 9000\n", 0, id="nothing-yet"),
        pytest.param("anon many\n", None, id="another-format"),
        pytest.param("one two three\n", None, id="other-columns"),
    ],
)
def test_what_cannot_be_reclaimed_counts(tmp_path: Path, text: str, used: int | None) -> None:
    (tmp_path / "memory.stat").write_text(text)
    assert container_memory(tmp_path) == used


def test_cgroup_version_1_counts_what_is_below_the_container_too(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.stat").write_text("cache 9\nrss 1\nshmem 2\ntotal_rss 3000\ntotal_shmem 200\n")
    (tmp_path / "memory/memory.limit_in_bytes").write_text("4000\n")
    assert container_memory(tmp_path) == 3200
    assert free_container_memory(tmp_path) == 800


@pytest.mark.parametrize(
    ("file", "limit", "free"),
    [
        ("memory.max", "4000\n", 3000),
        ("memory.max", "max\n", None),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),
        ("nothing", "4000\n", None),
    ],
)
def test_what_is_left_to_the_limit(tmp_path: Path, file: str, limit: str, free: int | None) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory.stat").write_text("anon 1000\n")
    (tmp_path / file).write_text(limit)
    assert free_container_memory(tmp_path) == free


def test_a_machine_without_cgroups_reports_nothing(tmp_path: Path) -> None:
    assert container_memory(tmp_path) is None
    assert free_container_memory(tmp_path) is None


def test_progress_has_the_highest_value_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = Reporter("team/run", "train")
    told = []
    for used in (100, 300, 200, None):
        monkeypatch.setattr(metrics, "container_memory", lambda used=used: used)
        answer = reporter.answer("/progress")
        assert answer is not None
        told.append(json.loads(answer[1]).get("peakMemoryBytes"))
    assert told == [100, 300, 300, None]


def test_peaks_are_metrics_and_outlive_the_process_in_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = Reporter("team/run", "train")
    monkeypatch.setattr(metrics, "container_memory", lambda: 3 << 30)
    reporter.note_memory(gpu=5 << 30)
    assert (reporter.progress.peak_gpu_memory_bytes, reporter.progress.peak_memory_bytes) == (5 << 30, 3 << 30)
    answer = reporter.answer("/metrics")
    assert answer is not None
    lines = {line.split("{")[0]: float(line.split()[-1]) for line in answer[1].decode().splitlines() if "{" in line}
    assert lines["internvl_gpu_memory_peak_bytes"] == 5 << 30
    assert lines["internvl_host_memory_peak_bytes"] == 3 << 30


def test_on_the_cpu_there_is_no_gpu_memory() -> None:
    reporter = Reporter("team/run", "train")
    reporter.note_memory(gpu=None)
    assert reporter.progress.peak_gpu_memory_bytes is None

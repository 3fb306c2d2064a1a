"""The memory of the container that a worker reports, for the message when it is killed for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from internvl_trainer import metrics
from internvl_trainer.metrics import Reporter, container_memory


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
    file = tmp_path / "memory.stat"
    file.write_text(text)
    assert container_memory(file) == used


def test_a_machine_without_cgroup_v2_reports_nothing(tmp_path: Path) -> None:
    assert container_memory(tmp_path / "none") is None


def test_progress_has_the_highest_value_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = Reporter("team/run", "train")
    told = []
    for used in (100, 300, 200, None):
        monkeypatch.setattr(metrics, "container_memory", lambda used=used: used)
        answer = reporter.answer("/progress")
        assert answer is not None
        told.append(json.loads(answer[1]).get("peakMemoryBytes"))
    assert told == [100, 300, 300, None]

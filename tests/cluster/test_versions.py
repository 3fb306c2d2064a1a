"""Which Kubernetes the harness runs, and what it says when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from ivft_cluster import go_build, releases
from ivft_cluster.shell import HarnessError


def test_the_newest_release_is_the_default_and_the_oldest_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES", raising=False)
    assert (releases.FLOOR, releases.DEFAULT) == ("1.34", "1.37")
    assert releases.release() == releases.RELEASES[releases.DEFAULT]


@pytest.mark.parametrize("minor", releases.RELEASES)
def test_a_variable_picks_another_release(monkeypatch: pytest.MonkeyPatch, minor: str) -> None:
    monkeypatch.setenv("KUBERNETES", minor)
    assert releases.release().startswith(f"{minor}.")
    assert f"-v{minor}." in releases.programs()[0].folder.name


def test_an_unknown_release_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES", "1.20")
    with pytest.raises(HarnessError, match=r"KUBERNETES: found '1.20', expected one of 1.34, 1.35, 1.36, 1.37"):
        releases.release()


def test_a_missing_daemon_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(go_build, "cache_dir", lambda: tmp_path)
    with pytest.raises(HarnessError, match=r"kubelet: not in .*; run `python -m ivft_cluster setup`"):
        releases.binary("kubelet")


def test_a_changed_source_causes_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(go_build, "SOURCES", tmp_path)
    source = tmp_path / "kubernetes/main.go"
    source.parent.mkdir()
    source.write_text("package main")
    before = releases.control_plane("1.37.2").folder
    source.write_text("package main // changed")
    assert releases.control_plane("1.37.2").folder != before

"""The meeting of all ranks before a step: one that does not come ends the attempt in two minutes, not in hours."""

from pathlib import Path

import pytest
import torch
from internvl_trainer.distributed import ENV_MEETING_SECONDS, Group
from trainer.two_ranks import run_on_two_ranks


@pytest.mark.slow
def test_who_does_not_come_to_a_step_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_MEETING_SECONDS, "1")
    run_on_two_ranks(Path(__file__).with_name("meeting_rank.py"), tmp_path, ())
    assert "Timed out waiting 1000ms" in (tmp_path / "error").read_text()
    assert (tmp_path / "sum").read_text() == "2.0", "around the first step and files, ranks wait for each other"


def test_only_the_step_is_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: seen.append(group))
    both = Group(0, 1, 0, torch.device("cpu"), control="slow", meeting="quick")
    assert both.meet([2.0]) == [2.0]
    both.meet([2.0], patient=True)
    both.sum([2.0])
    assert seen == ["quick", "slow", "slow"]

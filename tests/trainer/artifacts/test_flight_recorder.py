"""What NCCL's flight recorder wrote when a stage failed: kept with the attempt, bounded, and never the error."""

import logging
import os
from pathlib import Path

import pytest
from internvl_api.constants import ENV_ATTEMPT
from internvl_api.recipes.summary import recipe_config
from internvl_api.run_config import RunConfig
from internvl_trainer.artifacts import flight_recorder
from internvl_trainer.artifacts.flight_recorder import keep_recordings
from internvl_trainer.distributed import flight_folder, prepare_environment


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.setenv(ENV_ATTEMPT, "3")
    flight_folder().mkdir(parents=True)
    return recipe_config("internvl2-1b-lora").model_copy(update={"output": str(tmp_path / "output")})


def test_torch_is_told_to_record_where_the_launcher_looks(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    prepare_environment("cuda", 1)
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(flight_folder() / "nccl-rank-")
    assert int(os.environ["TORCH_FR_BUFFER_SIZE"]) > 0
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"


def test_recordings_are_kept_with_the_attempt(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight_recorder, "_MOST_BYTES", 100)
    for rank, size in ((0, 3), (1, 0), (2, 101), (3, 100)):
        (flight_folder() / f"nccl-rank-{rank}").write_bytes(b"x" * size)
    (flight_folder() / "other").write_bytes(b"x")
    kept = keep_recordings(config, "train")
    folder = tmp_path / "output" / "diagnostics" / "train-attempt-3"
    assert sorted(path.name for path in folder.iterdir()) == ["nccl-rank-0", "nccl-rank-3"]
    assert kept == [f"{config.output}/diagnostics/train-attempt-3/nccl-rank-{rank}" for rank in (0, 3)]


def test_at_most_sixteen_files_are_kept(config: RunConfig) -> None:
    for rank in range(40):
        (flight_folder() / f"nccl-rank-{rank:02}").write_bytes(b"x")
    assert len(keep_recordings(config, "train")) == 16


def test_nothing_recorded_is_nothing_kept(config: RunConfig, tmp_path: Path) -> None:
    assert keep_recordings(config, "train") == []
    assert not (tmp_path / "output").exists()


def test_a_storage_that_fails_does_not_hide_the_stages_error(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (flight_folder() / "nccl-rank-0").write_bytes(b"x")
    (tmp_path / "output").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert keep_recordings(config, "train") == []
    assert "could not be stored" in caplog.text

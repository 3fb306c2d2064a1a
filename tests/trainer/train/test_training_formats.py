"""Training on other formats: the losses of upstream's JSONL, also after SIGKILL."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from internvl_api.constants import ExitCode
from trainer.data.format_files import FORMATS, MEDIA, FormatFile, conversations, write_upstream
from trainer.runs import CHECKPOINT_EVERY, environment, losses, make_config, started, write_config

pytestmark = pytest.mark.slow

STORED = {"parquet shards": (), "webdataset": pytest.mark.soak}


def configured(folder: Path, annotation: Path) -> list[str]:
    """The command that trains on an annotation, on one rank with a worker process."""
    data = {"train": {"rows": {"annotation": str(annotation), "root": str(MEDIA)}}}
    config = make_config(str(folder / "out"), data=data, training={"dataWorkers": 1})
    return ["train", "--config", str(write_config(config, folder))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses on upstream's JSONL, in one go."""
    folder = tmp_path_factory.mktemp("upstream")
    arguments = configured(folder, write_upstream(folder, conversations()))
    with started(arguments, environment(folder), folder / "result") as stage:
        assert stage.wait() == ExitCode.OK, stage.output
    return losses(folder / "out")


@pytest.mark.parametrize(
    "file", [pytest.param(each, id=each.name, marks=STORED[each.name]) for each in FORMATS if each.name in STORED]
)
def test_a_killed_run_goes_on_with_the_losses_of_upstreams_rows(
    file: FormatFile, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    arguments = configured(tmp_path, file.write(tmp_path, file.rows))
    with started(arguments, environment(tmp_path), tmp_path / "killed") as stage:
        stage.wait_for(f"checkpoint at step {CHECKPOINT_EVERY} is complete")
        stage.stop(signal.SIGKILL)
        assert stage.wait() == -signal.SIGKILL
    with started(arguments, environment(tmp_path), tmp_path / "resumed") as stage:
        assert stage.wait() == ExitCode.OK, stage.output
    assert f"step {CHECKPOINT_EVERY}/" not in stage.output
    assert losses(tmp_path / "out") == undisturbed

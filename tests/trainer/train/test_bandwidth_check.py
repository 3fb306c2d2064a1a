"""What training measures of network and storage before its first step, and where it says so."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from internvl_api.status import Bandwidth
from internvl_trainer import all_reduce
from internvl_trainer.train.bandwidth_check import bandwidth, check_bandwidth, describe, next_size, report
from trainer.contexts import Alone, group_context
from trainer.runs import make_config
from trainer.two_ranks import run_on_two_ranks

WORKER = Path(__file__).with_name("bandwidth_rank.py")


@pytest.mark.parametrize(
    ("megabytes", "most", "seconds", "left", "larger"),
    [
        pytest.param(1, 512, 0.01, 8, 8, id="eight times as much"),
        pytest.param(64, 512, 0.9, 8, 512, id="the last one"),
        pytest.param(512, 512, 0.01, 8, None, id="no more than the most"),
        pytest.param(1, 512, 1.1, 8, None, id="it would take too long"),
        pytest.param(1, 4, 0.01, 0.3, 4, id="little on the CPU"),
        pytest.param(1, 4, 0.01, -1, None, id="the time is over"),
    ],
)
def test_a_measurement_grows_while_there_is_time(
    megabytes: int, most: int, seconds: float, left: float, larger: int | None
) -> None:
    assert next_size(megabytes, most, seconds, left) == larger


def test_rates_are_whole_and_those_that_are_none_are_left_out() -> None:
    assert bandwidth(all_reduce=1.5e9 + 0.4, storage_write=0.0, storage_read=None) == Bandwidth(all_reduce=1.5e9)


def test_the_line_in_the_log() -> None:
    found = Bandwidth(all_reduce=12.34e9, storage_write=0.25e9, storage_read=2e9)
    assert describe(found, 32, "s3://b/run", 7.04) == (
        "bandwidth: all-reduce 12.3 GB/s over 32 processes; each node writes 250 MB/s to s3://b/run and reads 2.0 GB/s "
        "from it (measured in 7.0 s)"
    )
    assert "nothing could be measured" in describe(Bandwidth(), 2, "s3://b/run", 1)


def test_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its collectives return before they are done, so that without this any network looks fast."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for device in ("cpu", "cuda", "cuda:3"):
        all_reduce._wait(device)
    assert waited == ["cuda", "cuda:3"]


def test_one_process_measures_nothing(tmp_path: Path) -> None:
    assert check_bandwidth(group_context(make_config(str(tmp_path)), "train", Alone())) is None
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_replaces_the_first_rate_and_keeps_the_others(tmp_path: Path) -> None:
    context = group_context(make_config(str(tmp_path)), "train", Alone())
    report(context, Bandwidth(all_reduce=1e9, storage_write=2e9, storage_read=3e9))
    report(context, bandwidth(storage_write=5e8))
    assert context.reporter.progress.bandwidth == Bandwidth(all_reduce=1e9, storage_write=5e8, storage_read=3e9)


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two ranks found in each scenario; the last one changes their storage."""
    return run_on_two_ranks(WORKER, tmp_path_factory.mktemp("ranks"), ("on", "off", "unavailable"))


def found_by_ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_measure_and_report(checks: Path) -> None:
    first, second = found_by_ranks(checks / "on")
    assert first["found"] == second["found"], "all ranks know the slowest rank's rates"
    assert first["found"].keys() == {"allReduce", "storageWrite", "storageRead"}
    assert first["progress"]["bandwidth"] == first["found"]
    line = re.compile(r'^internvl_train_bandwidth_bytes_per_second\{.*path="([a-z-]+)"\} (\S+)$', re.M)
    shown = dict(line.findall(first["metrics"]))
    assert {path: float(rate) for path, rate in shown.items()} == {
        "all-reduce": first["found"]["allReduce"],
        "storage-write": first["found"]["storageWrite"],
        "storage-read": first["found"]["storageRead"],
    }
    assert "bandwidth: all-reduce" in (checks / "on" / "log-0").read_text()
    assert "bandwidth:" not in (checks / "on" / "log-1").read_text()
    assert [path for path in (checks / "on" / "run").rglob("*") if path.is_file()] == [], "nothing is left"


@pytest.mark.slow
def test_it_can_be_turned_off(checks: Path) -> None:
    for rank in found_by_ranks(checks / "off"):
        assert rank["found"] is None
        assert "bandwidth" not in rank["progress"]
        assert 'path="' not in rank["metrics"]


@pytest.mark.slow
def test_a_storage_that_fails_one_rank_is_named_and_ends_nothing(checks: Path) -> None:
    first, _ = found_by_ranks(checks / "unavailable")
    assert first["found"].keys() == {"allReduce"}
    log = (checks / "unavailable" / "log-0").read_text()
    assert "the storage's bandwidth was not measured: rank 1: the bucket does not answer" in log
    assert [path for path in (checks / "unavailable" / "run").rglob("*") if path.is_file()] == []

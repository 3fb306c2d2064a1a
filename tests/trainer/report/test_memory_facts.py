"""The memory that a run used, beside what was estimated."""

from typing import Any

import pytest
from internvl_api.recipes.summary import recipe_config
from internvl_trainer.artifacts.manifest import Manifest
from internvl_trainer.report.page import facts
from internvl_trainer.report.record import Record

USED = {"peakGpuMemoryBytes": 40 << 30, "peakMemoryBytes": 200 << 30}


def shown(progress: Any) -> dict[str, tuple[str, str]]:
    trained = Manifest(fingerprint="x", files=[], sha256="", extra={"progress": progress})
    record = Record(config=recipe_config("internvl2-26b-full"), trained=trained)
    return {name: (value, note) for name, value, note in facts(record)}


def test_what_was_used_stands_beside_the_estimate() -> None:
    found = shown(USED)
    assert found["GPU memory"] == ("40.0 GiB", "estimated 49.3 GiB to 54.9 GiB with the longest rows")
    assert found["Host memory"] == ("200.0 GiB", "estimated 286.9 GiB")


@pytest.mark.parametrize("progress", [None, {}, [], {"peakGpuMemoryBytes": "much"}])
def test_without_figures_nothing_is_said(progress: Any) -> None:
    assert not {"GPU memory", "Host memory"} & shown(progress).keys()


def test_the_last_attempts_bandwidths() -> None:
    row = {"step": 1, "epoch": 0.1, "loss": 1.0, "step_seconds": 1.0, "tokens": 10, "world_size": 2}
    steps = [row | {"bandwidth": {"all_reduce": 1e9}}, row | {"bandwidth": {"all_reduce": 12.34e9}}, row]
    found = {name: value for name, value, _ in facts(Record(config=recipe_config("internvl2-26b-full"), steps=steps))}
    assert found["Network"] == "12.3 GB/s"
    assert "Storage" not in found

"""What a download says about itself."""

from __future__ import annotations

import pytest
from internvl_trainer.artifacts.download_progress import progress_text


@pytest.mark.parametrize(
    ("arrived", "total", "told"),
    [
        pytest.param(0, 0, "downloading s3://x", id="unknown-size"),
        pytest.param(0, 950, "downloading s3://x: 0.0 kB of 0.9 kB", id="tiny"),
        pytest.param(2_000, 4_100, "downloading s3://x: 2.0 kB of 4.1 kB", id="small"),
        pytest.param(5_000_000, 4_100_000, "downloading s3://x: 4.1 MB of 4.1 MB", id="other-files-beside-it"),
        pytest.param(1_500_000_000, 2_000_000_000, "downloading s3://x: 1.5 GB of 2.0 GB", id="large"),
    ],
)
def test_sizes_are_told_in_a_fitting_unit(arrived: int, total: int, told: str) -> None:
    assert progress_text("s3://x", arrived, total) == told

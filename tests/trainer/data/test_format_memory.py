"""A process that reads rows of Parquet and of WebDataset keeps none of them; the benchmark has a million."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.bench_formats import MOST_MB, read, write_parquet, write_webdataset

pytestmark = pytest.mark.slow

ROWS, READ = 8_000, 6_400


def test_both_containers_give_the_same_rows_in_bounded_memory(tmp_path: Path) -> None:
    figures = []
    for name, write in (("parquet", write_parquet), ("tar", write_webdataset)):
        (tmp_path / name).mkdir()
        figures.append(read(write(tmp_path / name, ROWS, 3), READ, tmp_path / "cache"))
    assert [each["rows"] for each in figures] == [ROWS, ROWS]
    assert figures[0]["digest"] == figures[1]["digest"]
    assert max(each["peak_rss_mb"] for each in figures) <= MOST_MB

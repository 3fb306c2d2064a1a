"""Measures the speed and memory of a rank that reads a million rows of Parquet and of WebDataset in a run's order."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

ROWS = int(os.environ.get("FORMAT_ROWS", "1000000"))
SHARDS = 10
READ = min(ROWS, 200_000)
MOST_MB = 300


def picture(number: int) -> bytes:
    """A PNG of its own for every 256th row."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, 40, 90)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(number) for number in range(256)]


def turns(number: int) -> list[dict[str, str]]:
    """A conversation of its own."""
    return [{"from": "human", "value": f"<image>\nWhat is number {number}?"}, {"from": "gpt", "value": f"{number}."}]


def write_parquet(folder: Path, rows: int, shards: int) -> str:
    """Shards of rows with stored pictures; their pattern."""
    for shard in range(shards):
        numbers = range(shard * rows // shards, (shard + 1) * rows // shards)
        table = pa.table(
            {
                "image": [{"bytes": PICTURES[number % 256], "path": f"{number}.png"} for number in numbers],
                "conversations": [turns(number) for number in numbers],
            }
        )
        pq.write_table(table, folder / f"rows-{shard:03d}.parquet", row_group_size=10_000)
    return f"{folder}/rows-*.parquet"


def write_webdataset(folder: Path, rows: int, shards: int) -> str:
    """Tar shards of the same rows; their pattern."""
    for shard in range(shards):
        with tarfile.open(folder / f"rows-{shard:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(shard * rows // shards, (shard + 1) * rows // shards):
                record = json.dumps({"conversations": turns(number)}).encode()
                for suffix, data in (("png", PICTURES[number % 256]), ("json", record)):
                    info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
                archive.members.clear()
    return f"{folder}/rows-*.tar"


def read(annotation: str, wanted: int, cache: Path, start: int = 0) -> dict[str, float]:
    """The figures of a child that reads rows."""
    script = Path(__file__).with_name("format_rows.py")
    env = {**os.environ, "INTERNVL_CACHE": str(cache)}
    arguments = [sys.executable, str(script), annotation, str(wanted), str(start)]
    done = subprocess.run(arguments, env=env, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def bench_streamed_formats(tmp_path: Path) -> None:
    """Both containers hold the same rows and give the same digest."""
    report = Table("container", "opened, s", "again, s", "rows/s", "own memory, MB", "of which imports", "RSS peak, MB")
    digests = set()
    for name, write in (("Parquet", write_parquet), ("WebDataset", write_webdataset)):
        folder = tmp_path / name
        folder.mkdir()
        pattern = write(folder, ROWS, SHARDS)
        first = read(pattern, 64, tmp_path / "cache")
        figures = read(pattern, READ, tmp_path / "cache")
        assert figures["rows"] == ROWS
        assert figures["anonymous_mb"] <= MOST_MB
        digests.add(figures["digest"])
        shown = ("rows_per_second", "anonymous_mb", "imports_mb", "peak_rss_mb")
        opened = first["open_seconds"], figures["open_seconds"]
        report.add_row(name, *map(str, opened), *(str(figures[key]) for key in shown))
        for path in folder.iterdir():
            path.unlink()
    assert len(digests) == 1
    Console(width=140).print(report)

"""A child process that reads rows and their pictures in a run's order: rows a second and memory, as JSON.

python format_rows.py ANNOTATION ROWS [START]
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

from internvl_trainer.data.formats.open_source import open_source
from internvl_trainer.data.formats.source import media_opener, read_row
from internvl_trainer.data.sampler import GlobalOrder

_BATCH = 64


def memory(name: str) -> float:
    """A figure of /proc/self/status in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1000


def main(annotation: str, wanted: int, start: int = 0) -> None:
    """Read `wanted` rows from step `start` on, and print digests of every step with the figures."""
    imported, began = memory("RssAnon"), time.monotonic()
    rows = open_source(annotation, "auto", field="spec.data.train.x").rows
    opened = time.monotonic() - began
    opener = media_opener(rows, lambda root, name: b"")
    order = GlobalOrder(len(rows), _BATCH, seed=3)
    digests, most = [], 0.0
    began = time.monotonic()
    for step in range(start, start + wanted // _BATCH):
        digest = hashlib.sha256()
        for position in order.batch(step):
            row, findings = read_row(rows, position.row, "rows")
            assert row is not None, findings
            digest.update(repr(row.turns).encode())
            for image in row.media.images:
                digest.update(opener("", image.path))
        digests.append(digest.hexdigest())
        most = max(most, memory("RssAnon"))
        if wanted <= 10_000:
            print(digests[-1], flush=True)
    seconds = time.monotonic() - began
    figures = {
        "rows": len(rows), "rows_per_second": round(wanted / seconds), "open_seconds": round(opened, 1),
        "anonymous_mb": round(most), "imports_mb": round(imported), "peak_rss_mb": round(memory("VmHWM")),
        "digest": hashlib.sha256("".join(digests).encode()).hexdigest(),
    }  # fmt: skip
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

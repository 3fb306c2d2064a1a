"""Measures preflight of text rows in one thread, four threads, and two processes. It asserts no limits of time."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
from golden import checkpoint, read_file, settings, tokenizer_of
from internvl_trainer.artifacts.storage import FolderStorage
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.index import RowIndex
from internvl_trainer.data.row_checks import ChatRows, Checker
from internvl_trainer.stages.row_shards import ShardStore, check_in_shards, spans_of
from rich.console import Console
from rich.table import Table

ROWS = int(os.environ.get("PREFLIGHT_ROWS", 1_000_000))


def bench_preflight(tmp_path: Path) -> None:
    """Check the same rows three times and print rows a second; every check writes to its own output.

    The check in two processes is killed when half of the shards are stored, then started again. Its time is the sum of
    both attempts.
    """
    path = tmp_path / "rows.jsonl"
    write_rows(path)
    dataset = DatasetDescription("rows", str(tmp_path), str(path))
    checker = Checker(dataset, settings("Hermes-2"), read_file, tokenizer_of(checkpoint("qwen2")))
    index = RowIndex.build(path)
    columns = ("processes", "threads per process", "rows/s", "speed-up over one thread")
    table = Table(*columns, title=f"preflight of {ROWS:,} rows of text")
    rates: list[float] = []
    for processes, threads in ((1, 1), (1, 4), (2, 4)):
        rows = ChatRows(index, checker, threads=threads)
        output = FolderStorage(tmp_path / f"output-{processes}-{threads}", field="spec.output")
        store = ShardStore(output, "shards", "x")
        sizes = np.zeros((ROWS, 2), np.int32)
        began = time.monotonic()
        kept = kill_halfway(rows, store, processes) if processes > 1 else {}
        assert check_in_shards(rows, range(ROWS), store, sizes, processes=processes) == []
        assert kept.items() <= written(store).items(), "a stored shard was checked again"
        assert (sizes[:, 0] > 0).all()
        rates.append(ROWS / (time.monotonic() - began))
        table.add_row(str(processes), str(threads), f"{rates[-1]:,.0f}", f"{rates[-1] / rates[0]:.2f} x")
        if kept:
            table.add_row("", "", f"killed with {len(kept)} of {len(spans_of(ROWS))} shards stored", "none repeated")
    Console().print(table)


def write_rows(path: Path) -> None:
    """Write ROWS different questions and answers without pictures."""
    with path.open("w") as file:
        for number in range(ROWS):
            turns = [
                {"from": "human", "value": f"What does the sign at corner {number} say?"},
                {"from": "gpt", "value": f"It says that street {number * 7919 % ROWS} is closed until the evening."},
            ]
            file.write(json.dumps({"id": number, "conversations": turns}) + "\n")


def kill_halfway(rows: ChatRows, store: ShardStore, processes: int) -> dict[str, float]:
    """Start the check, kill it when half of the shards are stored, and return `written` of these shards."""
    sizes = np.zeros((ROWS, 2), np.int32)
    work = multiprocessing.get_context("fork").Process(
        target=check_in_shards, args=(rows, range(ROWS), store, sizes), kwargs={"processes": processes}
    )
    work.start()
    while work.is_alive() and 2 * len(written(store)) < len(spans_of(ROWS)):
        time.sleep(0.5)
    work.kill()
    work.join()
    return written(store)


def written(store: ShardStore) -> dict[str, float]:
    """Return the modification time of each stored shard, in seconds, by file name."""
    return {path.name: path.stat().st_mtime for path in Path(store.uri).glob("*.json")}

"""`internvl-trainer doctor`: what on this machine would make a run fail or slow."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from internvl_api.constants import ExitCode
from rich.console import Console
from rich.table import Table
from rich.text import Text

from internvl_trainer.cli.options import count, load_config, on_chosen_device
from internvl_trainer.cli.stage import run_stage_here
from internvl_trainer.distributed import prepare_environment
from internvl_trainer.doctor.checks import Level, Row, check
from internvl_trainer.doctor.expectations import Expectations, parse_expectations
from internvl_trainer.doctor.probe import measure, torch_build
from internvl_trainer.terminal import printable

DESCRIPTION = """\
Check driver, GPUs, attention kernels, communication, disk, object storage, clock and limits of this machine. Changes
nothing; writes and removes one file on the disk, and one in the storage if it is named. With --config, do the stage
`doctor` of a run on all its workers, with the bounds of spec.doctor.expect.
"""
EXAMPLES = """\
examples:
  internvl-trainer doctor
  internvl-trainer doctor --storage s3://bucket/prefix
  internvl-trainer doctor --expect gpus=8,memory=80Gi,allreduce=200GB && internvl-trainer run --config run.yaml
  internvl-trainer doctor --output json

--expect takes, by comma: gpus, memory (of each GPU), nvlink (links of each GPU), allreduce, disk, storage (each a
second), free (on the disk), shm.

exit codes: 0 nothing failed (warnings are no failure)   65 a check failed
"""
_STYLE: dict[Level, str] = {"pass": "green", "warning": "yellow", "failure": "bold red", "skipped": "dim"}
_WORDS: dict[Level, str] = {"failure": "failed", "warning": "warned", "pass": "passed", "skipped": "skipped"}
_SIGN: dict[Level, str] = {"pass": "✓", "warning": "!", "failure": "✗", "skipped": "-"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--expect", type=_expectations, default=Expectations(), metavar="NAME=VALUE,…", help="fail below these"
    )
    parser.add_argument("--config", type=Path, metavar="RUN.YAML", help="do the stage `doctor` of this run")
    parser.add_argument("--storage", metavar="URI", help="measure this storage: {s3,gs,az}://bucket/prefix or a folder")
    parser.add_argument(
        "--size", type=count, default=256, metavar="MIB", help="size of the file for disk and storage (default: 256)"
    )
    parser.add_argument("--output", choices=("table", "json"), default="table", help="default: table")


def run(options: argparse.Namespace) -> int:
    """Measure, print and judge; or do the stage."""
    if options.config:
        return run_stage_here("doctor", on_chosen_device(load_config(options.config)), options.config)
    prepare_environment("cuda" if torch_build().gpus else "cpu", 1)
    rows = check(measure(storage=options.storage, megabytes=options.size), options.expect)
    if options.output == "json":
        print(as_json(rows))
    else:
        print_rows(rows, Console())
    return ExitCode.USER_ERROR if any(row.level == "failure" for row in rows) else ExitCode.OK


def as_json(rows: Sequence[Row]) -> str:
    """The rows as JSON; `result` is the worst level."""
    worst = next((level for level in _WORDS if any(row.level == level for row in rows)), "skipped")
    return json.dumps({"result": worst, "checks": [asdict(row) for row in rows]}, indent=2, ensure_ascii=False)


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """The rows as a table, and how many are of each level."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column("")
    table.add_column("check", no_wrap=True)
    table.add_column("found", overflow="fold")
    for row in rows:
        style = _STYLE[row.level]
        found = Text(printable(row.found))
        if row.advice:
            found.append(f"\n{printable(row.advice)}", "dim" if row.level == "skipped" else style)
        table.add_row(Text(_SIGN[row.level], style), Text(row.name, style), found)
    console.print(table)
    counted = Counter(row.level for row in rows)
    console.print(
        ", ".join(f"{counted[level]} {word}" for level, word in _WORDS.items() if counted[level]), style="bold"
    )


def _expectations(text: str) -> Expectations:
    try:
        return parse_expectations(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

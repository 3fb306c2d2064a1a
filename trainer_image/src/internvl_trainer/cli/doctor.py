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

from internvl_trainer.cli.options import CommandError, count, load_config, on_chosen_device
from internvl_trainer.cli.stage import run_stage_here
from internvl_trainer.distributed import prepare_environment
from internvl_trainer.doctor.bandwidth import lacking_room
from internvl_trainer.doctor.checks import Level, Row, check
from internvl_trainer.doctor.expectations import Expectations, parse_expectations
from internvl_trainer.doctor.probe import measure, torch_build
from internvl_trainer.signals import StopRequested, stop_by_exception
from internvl_trainer.terminal import printable

DESCRIPTION = """\
Check driver, GPUs, attention kernels, communication, disk, object storage, clock and limits of this machine. Changes
nothing; writes and removes one file on the disk, and one in the storage if it is named. With --config, do the stage
`doctor` of a run on all its workers, with the bounds of spec.doctor.expect; other options are refused beside it.
"""
EXAMPLES = """\
examples:
  internvl-trainer doctor
  internvl-trainer doctor --storage s3://bucket/prefix
  internvl-trainer doctor --expect gpus=8,memory=80Gi,allreduce=200GB && internvl-trainer run --config run.yaml
  internvl-trainer doctor --output json

--expect takes, by comma: gpus, memory (of each GPU), nvlink (links of each GPU), allreduce, disk, storage (each a
second), free (on the disk), shm.

exit codes: 0 nothing failed (warnings are no failure)   65 a check failed, or wrong options   75 stopped
"""
_SIZE = 256  # MiB
_STYLE: dict[Level, str] = {"pass": "green", "warning": "yellow", "failure": "bold red", "skipped": "dim"}
_WORDS: dict[Level, str] = {"failure": "failed", "warning": "warned", "pass": "passed", "skipped": "skipped"}
_SIGN: dict[Level, str] = {"pass": "✓", "warning": "!", "failure": "✗", "skipped": "-"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--expect", type=_expectations, metavar="NAME=VALUE,…", help="fail below these")
    parser.add_argument("--config", type=Path, metavar="RUN.YAML", help="do the stage `doctor` of this run")
    parser.add_argument("--storage", metavar="URI", help="measure this storage: {s3,gs,az}://bucket/prefix or a folder")
    parser.add_argument(
        "--size",
        type=count,
        metavar="MIB",
        help=f"size of the test file; at most half of the free disk space (default: {_SIZE})",
    )
    parser.add_argument("--output", choices=("table", "json"), help="default: table")


def run(options: argparse.Namespace) -> int:
    """Measure, print and judge; or do the stage."""
    if options.config:
        _refuse_beside_config(options)
        return run_stage_here("doctor", on_chosen_device(load_config(options.config)), options.config)
    if options.size:
        _check_size(options.size)
    prepare_environment("cuda" if torch_build().gpus else "cpu", 1)
    try:
        with stop_by_exception():
            machine = measure(storage=options.storage, megabytes=options.size or _SIZE)
    except StopRequested as stop:
        raise CommandError(f"stopped by {stop}; nothing is left on disk or storage", ExitCode.RESUME) from None
    rows = check(machine, options.expect or Expectations())
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


def _refuse_beside_config(options: argparse.Namespace) -> None:
    """Raises CommandError for options that the stage of a run does not take."""
    given = [f"--{name}" for name in ("expect", "storage", "size", "output") if getattr(options, name) is not None]
    if given:
        raise CommandError(
            f"found {', '.join(given)} beside --config, which does the stage `doctor` of a run: its bounds are "
            "spec.doctor.expect, its storage is spec.output, and its rows are in stages/doctor/doctor.json there; "
            f"drop {', '.join(given)}, or drop --config to check this machine alone",
            ExitCode.USER_ERROR,
        )


def _check_size(megabytes: int) -> None:
    """Raises CommandError when the temporary folder has too little room for a file of that size."""
    try:
        lacking = lacking_room(megabytes)
    except OSError:  # the row of the disk says why
        return
    if lacking:
        raise CommandError(
            f"--size: {lacking}; give a smaller --size, or set TMPDIR to a larger disk", ExitCode.USER_ERROR
        )


def _expectations(text: str) -> Expectations:
    try:
        return parse_expectations(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

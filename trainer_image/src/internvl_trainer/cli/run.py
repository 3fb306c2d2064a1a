"""`internvl-trainer run`: all stages on this machine, with a progress display."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import urllib.request
from pathlib import Path

from internvl_api.constants import ExitCode
from internvl_api.pipeline import PARALLEL_STAGES
from internvl_api.run_config import RunConfig
from internvl_api.status import Progress, StageName, StageResult
from rich.console import Console
from rich.text import Text

from internvl_trainer.cli.display import Display
from internvl_trainer.cli.launcher import launch, own_command
from internvl_trainer.cli.options import add_config, count, load_config, on_chosen_device
from internvl_trainer.distributed import Rendezvous, free_port, prepare_environment
from internvl_trainer.errors import UserError
from internvl_trainer.exit_status import Outcome, conclude, configure_logging
from internvl_trainer.metrics import Reporter
from internvl_trainer.stage_store import stages_of
from internvl_trainer.stages.pipeline import run_stage

DESCRIPTION = """\
Run every stage on this machine: preflight, the evaluations, training, merging and publishing, as run.yaml asks for
them. After Ctrl-C or a crash the same command goes on where it was; a stage that is done is skipped.
"""
EXAMPLES = """\
examples:
  internvl-trainer resolve cr.yaml > run.yaml         from an InternVLFineTune
  internvl-trainer run --config run.yaml
  internvl-trainer run --config run.yaml --nproc 4    four GPUs instead of the file's, with the same global batch

exit codes: those of `internvl-trainer --help`; 70 says that the figures do not meet publishIf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_config(parser)
    parser.add_argument(
        "--nproc",
        type=count,
        metavar="N",
        help="training processes (default: one, or one a GPU); the global batch stays",
    )


def run(options: argparse.Namespace) -> int:
    """Run every stage of run.yaml."""
    return run_stages(on_chosen_device(load_config(options.config)), processes=options.nproc)


def run_stages(config: RunConfig, processes: int | None) -> int:
    """Run every stage in turn until one does not succeed; the exit code of the last."""
    console = Console(stderr=True)
    try:
        config = for_this_machine(config, processes)
    except UserError as error:
        console.print(Text(f"{error.reason}: ", style="bold red"), end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return ExitCode.CONFIG
    prepare_environment(config.device, config.processes_per_worker)
    with Display(console) as display, tempfile.TemporaryDirectory(prefix="run-") as scratch:
        configure_logging(display.log_handler())
        for stage in stages_of(config):
            if stage in PARALLEL_STAGES:
                outcome = _in_children(stage, config, Path(scratch), display)
            else:
                outcome = _here(stage, config, display)
            display.finish(stage, outcome.result)
            if outcome.code != ExitCode.OK:
                break
    for name, uri in outcome.result.artifacts.items():
        console.print(f"{name:>12}  {uri}", markup=False, highlight=False, soft_wrap=True)
    return outcome.code


def for_this_machine(config: RunConfig, processes: int | None) -> RunConfig:
    """The same run on one machine: the global batch stays, accumulation follows. Raises UserError."""
    count = processes or (config.processes_per_worker if config.device == "cuda" else 1)
    training = config.training
    accumulation, rest = divmod(training.global_batch_size, count * training.micro_batch_size)
    if rest or not accumulation:
        raise UserError(
            "BatchNotDivisible",
            f"found {training.global_batch_size}, which {count} processes x microBatchSize "
            f"{training.micro_batch_size} does not divide; choose another --nproc",
            "training.globalBatchSize",
        )
    return config.model_copy(
        update={"workers": 1, "processes_per_worker": count, "gradient_accumulation": accumulation}
    )


def _here(stage: StageName, config: RunConfig, display: Display) -> Outcome:
    reporter = Reporter(config.job, stage)
    with display.follow(stage, lambda: reporter.progress):
        return conclude(stage, lambda: run_stage(stage, config, reporter))


def _in_children(stage: StageName, config: RunConfig, scratch: Path, display: Display) -> Outcome:
    """Run a stage in child processes, so that this process can report a crash of theirs."""
    path, result_path = scratch / "run.yaml", scratch / f"{stage}.json"
    path.write_text(config.to_yaml(reveal=True), encoding="utf-8")
    port = int(os.environ.setdefault("INTERNVL_METRICS_PORT", str(free_port())))
    count = config.processes_per_worker
    rendezvous = Rendezvous("127.0.0.1", free_port(), world_size=count, rank=0, local_rank=0, processes=count)
    with display.follow(stage, lambda: _ask(port)):
        code = launch(own_command(stage, str(path)), rendezvous, result_path, output=display.line, stage=stage)
    return Outcome(code, _read_result(stage, result_path, code))


def _read_result(stage: StageName, path: Path, code: int) -> StageResult:
    if path.exists():
        return StageResult.model_validate_json(path.read_text(encoding="utf-8"))
    return StageResult(
        stage=stage, outcome="failed", reason="ProcessKilled", message=f"a process of it ended with {code}"
    )


def _ask(port: int) -> Progress | None:
    """The children's /progress, or None while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=1) as answer:
            return Progress.model_validate(json.load(answer))
    except OSError:
        return None

"""`internvl-trainer run`: all stages on this machine, with a progress display."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path

from internvl_api.constants import ExitCode
from internvl_api.pipeline import PARALLEL_STAGES
from internvl_api.run_config import RunConfig
from internvl_api.status import Progress, StageName, StageResult
from rich.console import Console
from rich.text import Text

from internvl_trainer.cli.display import Display
from internvl_trainer.cli.figures_table import figures_of_results, figures_table
from internvl_trainer.cli.gpus import check_gpus, largest_fitting
from internvl_trainer.cli.interrupt import answered, stop_notice
from internvl_trainer.cli.launcher import Peers, decisive_outcome, launch, own_command
from internvl_trainer.cli.options import add_config, count, load_config, on_chosen_device
from internvl_trainer.cli.place import Place, take_place
from internvl_trainer.cli.team import Leader, follow, lead
from internvl_trainer.distributed import Rendezvous, free_port, prepare_environment
from internvl_trainer.errors import UserError
from internvl_trainer.exit_status import Outcome, conclude, configure_logging, exit_code_of
from internvl_trainer.metrics import Reporter
from internvl_trainer.signals import StopRequested, stop_by_exception
from internvl_trainer.stage_store import stages_of
from internvl_trainer.stages.pipeline import run_stage

DESCRIPTION = """\
Run every stage on this machine: preflight, the evaluations, training, merging and publishing, as run.yaml asks for
them; with method none only an evaluation. After Ctrl-C or a crash the same command goes on where it was; a stage that
is done is skipped. Relative paths in run.yaml start at its folder. Started by srun or torchrun, on one machine or
several, the tasks do one run together.
"""
EXAMPLES = """\
examples:
  internvl-trainer resolve cr.yaml > run.yaml       from an InternVLFineTune
  internvl-trainer run run.yaml
  internvl-trainer run run.yaml --nproc 4           four GPUs instead of the file's, with the same global batch
  internvl-trainer run run.yaml --device cpu --nproc 2
                                                    rehearse it on the processor, with two processes
  srun internvl-trainer run run.yaml                in a Slurm job, one task for each node or for each GPU

exit codes: those of `internvl-trainer --help`; 70 says that the figures do not meet publishIf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("path", type=Path, nargs="?", metavar="RUN.YAML", help="the run; the same as --config")
    add_config(parser)
    parser.add_argument(
        "--nproc",
        type=count,
        metavar="N",
        help="training processes (default: one, or one a GPU); the global batch stays",
    )
    parser.add_argument("--device", choices=["cpu"], help="cpu: train on the processor, whatever the file says")


def run(options: argparse.Namespace) -> int:
    """Run every stage of run.yaml."""
    config = load_config(options.path or options.config)
    if options.device:
        config = config.model_copy(update={"device": options.device})
    return run_stages(on_chosen_device(config), processes=options.nproc)


def run_stages(config: RunConfig, processes: int | None) -> int:
    """Run every stage in turn until one does not succeed; the exit code of the last.

    Args:
        processes: training processes of this task; None: one for each GPU that run.yaml asks for on a machine.
    """
    console = Console(stderr=True)
    try:
        place = take_place(os.environ)
        config = for_this_run(config, processes, place)
        prepare_environment(config.device, config.processes_per_worker)
        if place is None:
            return _Run(config, own_ranks(config, None)).all_stages(console)
        ranks = own_ranks(config, place)
        if place.task > 0:
            return _follow(config, place, ranks)
        print(f"waiting for {place.tasks - 1} other task(s) at {place.host}:{place.port}", file=sys.stderr)
        with lead(place) as leader:
            code = _Run(config, ranks, leader).all_stages(console)
            leader.end(code)
            return code
    except UserError as error:
        console.print(Text(f"{error.reason}: ", style="bold red"), end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        code = exit_code_of(error)
        return ExitCode.CONFIG if code == ExitCode.USER_ERROR else code


def for_this_run(config: RunConfig, processes: int | None, place: Place | None = None) -> RunConfig:
    """The same run on the machines of its tasks: the global batch of training stays, accumulation follows.

    Raises UserError when this machine has too few GPUs, or when the processes do not divide the global batch.
    """
    tasks, local_tasks = (place.tasks, place.local_tasks) if place else (1, 1)
    wanted = config.processes_per_worker if config.device == "cuda" and local_tasks == 1 else 1
    count = processes or wanted
    check_gpus(config, count, asked=processes is not None, tasks=tasks)
    total = count * tasks
    accumulation = _accumulation(config, count, tasks) if config.trains else 1
    here = count * local_tasks
    return config.model_copy(
        update={"workers": total // here, "processes_per_worker": here, "gradient_accumulation": accumulation}
    )


def _accumulation(config: RunConfig, count: int, tasks: int) -> int:
    """Gradient accumulation with `count` processes in each task. Raises UserError when it is not whole."""
    training, total = config.training, count * tasks
    accumulation, rest = divmod(training.global_batch_size, total * training.micro_batch_size)
    if rest or not accumulation:
        raise UserError(
            "BatchNotDivisible",
            f"found {training.global_batch_size}, which {total} processes x microBatchSize "
            f"{training.micro_batch_size} does not divide; use --nproc {largest_fitting(config, count, tasks) or 1}",
            "training.globalBatchSize",
        )
    return accumulation


def own_ranks(config: RunConfig, place: Place | None) -> Rendezvous:
    """The ranks that this task starts, with port 0: each stage has a port of its own."""
    if place is None:
        count = config.processes_per_worker
        return Rendezvous("127.0.0.1", 0, world_size=count, rank=0, local_rank=0, processes=count)
    count = config.processes_per_worker // place.local_tasks
    return Rendezvous(
        place.host,
        0,
        world_size=count * place.tasks,
        rank=count * place.task,
        local_rank=count * place.local_task,
        processes=count,
    )


@dataclass
class _Run:
    """The stages of a run, in the task that leads it.

    Attributes:
        ranks: those that this task starts.
        leader: connects to the other tasks; None for a run of one task.
        results: of the stages so far.
    """

    config: RunConfig
    ranks: Rendezvous
    leader: Leader | None = None
    results: list[StageResult] = field(default_factory=list)
    stage: StageName | None = None

    def all_stages(self, console: Console) -> int:
        """Run the stages until one does not succeed, then show what they measured and stored; the last exit code."""
        stages = stages_of(self.config)
        code: int = ExitCode.OK
        with Display(console, stages) as display, _scratch() as scratch, stop_by_exception():
            configure_logging(display.log_handler())
            with answered(display.say, lambda: self._stop_notice(display), display.stop):
                try:
                    for stage in stages:
                        self.stage = stage
                        outcome = self._run(stage, scratch, display)
                        self.results.append(outcome.result)
                        display.finish(stage, outcome.result)
                        if (code := outcome.code) != ExitCode.OK:
                            break
                except StopRequested:  # between two stages
                    code = ExitCode.RESUME
        self._show_results(console)
        return code

    def _run(self, stage: StageName, scratch: Path, display: Display) -> Outcome:
        if stage not in PARALLEL_STAGES:
            reporter = Reporter(self.config.job, stage)
            with display.follow(stage, lambda: reporter.progress):
                return conclude(stage, lambda: run_stage(stage, self.config, reporter))
        port = free_port()
        if self.leader is not None:
            self.leader.start(stage, port)
        metrics = int(os.environ.setdefault("INTERNVL_METRICS_PORT", str(free_port())))
        with display.follow(stage, lambda: _ask(metrics)):
            outcome = in_children(stage, self.config, self.ranks, port, scratch, display.line, self.leader)
            return decisive_outcome(self.leader.outcomes(stage, outcome)) if self.leader is not None else outcome

    def _stop_notice(self, display: Display) -> str:
        stage = self.stage
        return stop_notice(self.config, stage, takes_steps=stage is not None and display.takes_steps(stage))

    def _show_results(self, console: Console) -> None:
        figures = figures_of_results(self.results)
        if (table := figures_table(figures, alone=not self.config.trains)) is not None:
            console.print(table)
        for name, uri in (self.results[-1].artifacts if self.results else {}).items():
            console.print(f"{name:>12}  {uri}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="run-") as folder:
        yield Path(folder)


def _follow(config: RunConfig, place: Place, ranks: Rendezvous) -> int:
    """Run what task 0 asks for until the run ends; the run's exit code."""
    os.environ.setdefault("INTERNVL_METRICS_PORT", str(free_port()))
    try:
        with stop_by_exception(), _scratch() as scratch, follow(place) as follower:
            for stage, port in follower.orders():
                follower.answer(in_children(stage, config, ranks, port, scratch, _print, follower))
            return follower.code
    except StopRequested:
        return ExitCode.RESUME


def in_children(
    stage: StageName,
    config: RunConfig,
    ranks: Rendezvous,
    port: int,
    scratch: Path,
    output: Callable[[str], None],
    peers: Peers | None,
) -> Outcome:
    """Run a stage in child processes, so that this process can report a crash of theirs."""
    path, result_path = scratch / "run.yaml", scratch / f"{stage}.json"
    path.write_text(config.to_yaml(reveal=True), encoding="utf-8")
    command = own_command(stage, str(path))
    code = launch(command, replace(ranks, master_port=port), result_path, output=output, stage=stage, peers=peers)
    return Outcome(code, _read_result(stage, result_path, code))


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _read_result(stage: StageName, path: Path, code: int) -> StageResult:
    if path.exists():
        return StageResult.model_validate_json(path.read_text(encoding="utf-8"))
    return StageResult(
        stage=stage, outcome="failed", reason="ProcessKilled", message=f"a process of it ended with {code}"
    )


def _ask(port: int) -> Progress | None:
    """The children's /progress, or None while nobody answers, or answers something else."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=1) as answer:
            return Progress.model_validate(json.load(answer))
    except (OSError, ValueError, HTTPException):  # HTTPException: the child ended while it answered
        return None

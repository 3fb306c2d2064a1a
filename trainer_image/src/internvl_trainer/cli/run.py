"""`internvl-trainer run`: all stages on this machine, with a progress display."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl_api.constants import ExitCode
from internvl_api.pipeline import PARALLEL_STAGES
from internvl_api.run_config import RunConfig
from internvl_api.status import Progress, StageName, StageResult
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from internvl_trainer.cli.launcher import launch, own_command
from internvl_trainer.distributed import Rendezvous, free_port, prepare_environment
from internvl_trainer.errors import UserError
from internvl_trainer.exit_status import Outcome, conclude, configure_logging
from internvl_trainer.metrics import Reporter
from internvl_trainer.stages.pipeline import run_stage, stages_of

_REFRESH_SECONDS = 0.5


def run(config: RunConfig, processes: int | None) -> int:
    """Every stage in turn until one does not succeed; the exit code of the last."""
    console = Console(stderr=True)
    try:
        config = for_this_machine(config, processes)
    except UserError as error:
        console.print(f"[bold red]{error.reason}[/]: ", end="")
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
    """A stage of several processes, in children: a crash leaves this one able to say so."""
    path, result_path = scratch / "run.yaml", scratch / f"{stage}.json"
    path.write_text(config.to_yaml(), encoding="utf-8")
    port = int(os.environ.setdefault("INTERNVL_METRICS_PORT", str(free_port())))
    count = config.processes_per_worker
    rendezvous = Rendezvous("127.0.0.1", free_port(), world_size=count, rank=0, local_rank=0, processes=count)
    with display.follow(stage, lambda: _ask(port)):
        code = launch(own_command(stage, str(path)), rendezvous, result_path, output=display.line)
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


class Display:
    """One line a stage: what it is at, steps, loss, time left. Log lines go above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            SpinnerColumn(finished_text="•"),
            TextColumn("[bold]{task.fields[stage]:<17}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[StageName, TaskID] = {}

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def log_handler(self) -> logging.Handler:
        """Puts this process's log where the children's goes."""
        handler = logging.Handler()
        handler.emit = lambda record: self.line(handler.format(record))  # type: ignore[method-assign]
        return handler

    def line(self, text: str) -> None:
        """Show a line of a log, above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def follow(self, stage: StageName, read: Callable[[], Progress | None]) -> Iterator[None]:
        """Keep the stage's line up to date while the body runs."""
        self._tasks[stage] = self._bars.add_task("starting", stage=stage, total=None)
        done = threading.Event()

        def refresh() -> None:
            while not done.wait(_REFRESH_SECONDS):
                if (progress := read()) is not None:
                    self._show(stage, progress)

        thread = threading.Thread(target=refresh, name="display", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def finish(self, stage: StageName, result: StageResult) -> None:
        """The stage's last word stays on its line."""
        color = {"succeeded": "green", "resume": "yellow", "failed": "red"}[result.outcome]
        self._bars.update(self._tasks[stage], description=f"[{color}]{result.reason}[/]", total=1, completed=1)
        self._console.print(f"[{color}]{stage}: {result.reason}:[/] ", end="")
        self._console.print(result.message, markup=False, highlight=False, soft_wrap=True)

    def _show(self, stage: StageName, progress: Progress) -> None:
        words = [progress.detail or ""]
        if progress.loss is not None:
            words.append(f"loss {progress.loss:.4f}")
        if progress.validation_loss is not None:
            words.append(f"validation {progress.validation_loss:.4f}")
        if progress.eta_seconds is not None:
            words.append(f"{progress.eta_seconds:.0f} s left")
        self._bars.update(
            self._tasks[stage], description="  ".join(words), total=progress.total_steps, completed=progress.step or 0
        )

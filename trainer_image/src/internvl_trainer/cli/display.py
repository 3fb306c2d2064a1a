"""The progress display of `internvl-trainer run`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from internvl_api.status import Progress, StageName, StageResult
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from internvl_trainer.terminal import printable

_REFRESH_SECONDS = 0.5


class Display:
    """One line for each stage with its activity, steps, loss and time left; log lines go above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            SpinnerColumn(finished_text="•"),
            TextColumn("[bold]{task.fields[stage]:<17}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False, style="default"),
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
        """A handler that shows this process's log above the bars, like the children's."""
        handler = logging.Handler()
        handler.emit = lambda record: self.line(handler.format(record))  # type: ignore[method-assign]
        return handler

    def line(self, text: str) -> None:
        """Show a line of a log, above the bars."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

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
        """Leave the stage's result on its line."""
        color = {"succeeded": "green", "resume": "yellow", "failed": "red"}[result.outcome]
        self._bars.update(self._tasks[stage], description=printable(result.reason), total=1, completed=1)
        self._console.print(Text(f"{stage}: {printable(result.reason)}: ", style=color), end="")
        self._console.print(printable(result.message), markup=False, highlight=False, soft_wrap=True)

    def _show(self, stage: StageName, progress: Progress) -> None:
        words = [printable(progress.detail or "")]
        if progress.loss is not None:
            words.append(f"loss {progress.loss:.4f}")
        if progress.validation_loss is not None:
            words.append(f"validation {progress.validation_loss:.4f}")
        if progress.eta_seconds is not None:
            words.append(f"{progress.eta_seconds:.0f} s left")
        self._bars.update(
            self._tasks[stage], description="  ".join(words), total=progress.total_steps, completed=progress.step or 0
        )

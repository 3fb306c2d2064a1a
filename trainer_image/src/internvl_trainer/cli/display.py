"""The progress display of `internvl-trainer run`: a line for each stage, and the log above."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from internvl_api.constants import STARTING
from internvl_api.status import Progress, StageName, StageResult
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from internvl_trainer.cli.stage_line import StageLine, render
from internvl_trainer.terminal import printable

_REFRESH_SECONDS = 0.5
_COLOURS = {"succeeded": "green", "resume": "yellow", "failed": "red"}


class Display:
    """One line for each stage with its activity, steps, loss and time; log lines go above."""

    def __init__(
        self, console: Console, stages: Sequence[StageName], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._clock = console, clock
        self._lines = {stage: StageLine(stage) for stage in stages}
        self._live = Live(
            get_renderable=self.rendered, console=console, refresh_per_second=4, vertical_overflow="visible"
        )

    def __enter__(self) -> Display:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the lines as they are and give the terminal back."""
        self._live.stop()

    def rendered(self) -> Group:
        """The lines as they are now, at the width of the console."""
        now = self._clock()
        return Group(*(render(line, self._console.width, now) for line in self._lines.values()))

    def log_handler(self) -> logging.Handler:
        """A handler that shows this process's log above the lines, like the children's."""
        handler = logging.Handler()
        handler.emit = lambda record: self.line(handler.format(record))  # type: ignore[method-assign]
        return handler

    def line(self, text: str) -> None:
        """Show a line of a log, above the stages."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Show a line that answers the person at the terminal."""
        self._console.print(Text(printable(text), style="bold yellow"), soft_wrap=True)

    @contextmanager
    def follow(self, stage: StageName, read: Callable[[], Progress | None]) -> Iterator[None]:
        """Keep the stage's line up to date while the body runs."""
        line = self._lines[stage]
        line.began, line.detail = self._clock(), STARTING
        done = threading.Event()

        def refresh() -> None:
            while not done.wait(_REFRESH_SECONDS):
                line.note(read())

        thread = threading.Thread(target=refresh, name="display", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def takes_steps(self, stage: StageName) -> bool:
        """Whether the stage has reported a step: then a stop saves what it did."""
        return self._lines[stage].progress.step is not None

    def finish(self, stage: StageName, result: StageResult) -> None:
        """Leave the stage's result on its line, beside its last steps and loss."""
        line = self._lines[stage]
        line.note(result.progress)
        line.ended, line.result = self._clock(), result
        text = Text(f"{stage}: {printable(result.reason)}: ", style=_COLOURS[result.outcome])
        self._console.print(text, end="")
        self._console.print(printable(result.message), markup=False, highlight=False, soft_wrap=True)

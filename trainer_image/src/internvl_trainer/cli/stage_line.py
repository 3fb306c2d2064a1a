"""One stage's line on the terminal, cut to the terminal's width."""

from __future__ import annotations

from dataclasses import dataclass, field

from internvl_api.constants import TAKING_STEPS
from internvl_api.pipeline import PARALLEL_STAGES
from internvl_api.status import Progress, StageName, StageResult
from rich.text import Text

from internvl_trainer.terminal import printable

_NAME_WIDTH = len("baseline-evaluate")
_BAR_WIDTH = 20
_WIDE = 100  # columns of a terminal with room for a bar and units
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_MARKS = {"succeeded": ("✓", "green"), "resume": ("‖", "yellow"), "failed": ("✗", "red")}


@dataclass
class StageLine:
    """What a stage's line shows.

    Attributes:
        progress: the last figures that the stage reported; those that it leaves out later are kept.
        began, ended: seconds of the display's clock; None before it has begun or ended.
    """

    stage: StageName
    progress: Progress = field(default_factory=Progress)
    detail: str = ""
    began: float | None = None
    ended: float | None = None
    result: StageResult | None = None

    def note(self, progress: Progress | None) -> None:
        """Take over the figures of a report; None: there is none."""
        if progress is None:
            return
        self.detail = progress.detail or ""
        self.progress = self.progress.model_copy(update=progress.model_dump(exclude_none=True))

    @property
    def is_running(self) -> bool:
        """Whether the stage has begun and not ended."""
        return self.began is not None and self.result is None


def render(line: StageLine, width: int, now: float) -> Text:
    """The line in `width` columns: mark, stage, what it does or did, and its time, which runs until it ends."""
    if line.began is None:
        return Text(f"  {line.stage}", style="dim")
    mark, style = _mark(line, now)
    clock = duration((now if line.ended is None else line.ended) - line.began)
    room = max(0, width - 2 - _NAME_WIDTH - 1 - 1 - len(clock))
    text = Text(f"{mark} ", style=style)
    text.append(f"{line.stage:<{_NAME_WIDTH}} ", style="bold")
    if width >= _WIDE and line.is_running and (bar := _bar(line.progress)):
        text.append(f"{bar} ", style="cyan")
        room -= len(bar) + 1
    text.append(f"{_cut('  '.join(_words(line, units=width >= _WIDE)), room):<{room}} ", style="default")
    text.append(clock, style="cyan")
    return text


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def time_left(seconds: float) -> str:
    """An estimate in the unit that a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s left"
    minutes = round(seconds / 60)
    return f"{minutes} min left" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min left"


def _mark(line: StageLine, now: float) -> tuple[str, str]:
    if line.result is None:
        return _SPINNER[int(now * 4) % len(_SPINNER)], "cyan"
    return _MARKS[line.result.outcome]


def _bar(progress: Progress) -> str:
    if not progress.total_steps:
        return ""
    filled = _BAR_WIDTH * min(progress.step or 0, progress.total_steps) // progress.total_steps
    return "━" * filled + "─" * (_BAR_WIDTH - filled)


def _words(line: StageLine, *, units: bool) -> list[str]:
    """The figures of a stage, then its activity or how it ended; the most important come first."""
    progress = line.progress
    words: list[str] = []
    if progress.total_steps and line.stage in PARALLEL_STAGES:
        unit = (" steps" if line.stage == "train" else " rows") if units else ""
        words.append(f"{progress.step or 0}/{progress.total_steps}{unit}")
    if progress.loss is not None:
        words.append(f"loss {progress.loss:.4f}")
    if progress.validation_loss is not None:
        words.append(f"val {progress.validation_loss:.4f}")
    if line.result is not None:
        return [*words, printable(line.result.reason)]
    is_last = progress.total_steps is not None and progress.step == progress.total_steps
    if progress.eta_seconds is not None and not is_last:
        words.append(time_left(progress.eta_seconds))
    if line.detail != TAKING_STEPS or progress.step is None:
        words.append(" ".join(printable(line.detail).split()))
    return words


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: max(0, room - 1)]}…"[:room]

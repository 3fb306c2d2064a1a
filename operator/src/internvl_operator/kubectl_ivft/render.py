"""Render runs for a terminal. Pure: from raw objects to rich renderables."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from internvl_api.publish_condition import ANSWER_METRICS
from internvl_api.status import Condition, InternVLFineTuneStatus, Progress, StageStatus
from internvl_api.validation.violations import SpecError
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from internvl_operator.core.run import read_status, recorded_defaults
from internvl_operator.core.stages import ending
from internvl_operator.core.telemetry import printable
from internvl_operator.kubectl_ivft.cost import Line
from internvl_operator.kubectl_ivft.diff import Difference, shown
from internvl_operator.kubectl_ivft.events import Cause
from internvl_operator.kubectl_ivft.explain import Explanation, Tone, explain
from internvl_operator.kubectl_ivft.humanize import age, ago, clock, duration, took

Raw = dict[str, Any]
_LONGEST_VALUE = 200  # characters
_BAR = 30  # columns
_TONES: dict[Tone, str] = {"good": "green", "busy": "cyan", "waits": "yellow", "bad": "red"}
_PHASES = {"Succeeded": "green", "Running": "green", "Suspended": "yellow", "Stalled": "red", "Failed": "red"}
_MARKS = {"Succeeded": ("✓", "green"), "Running": ("●", "cyan"), "Failed": ("✗", "red"), "Skipped": ("–", "dim")}
# Sentence for each condition and status worth showing. Ready=False and others are omitted: they repeat another one.
_SENTENCES = {
    ("Ready", "True"): "Published",
    ("Reconciling", "True"): "In progress",
    ("Stalled", "True"): "Stalled",
    ("Suspended", "True"): "Suspended",
    ("Failed", "True"): "Failed",
    ("MemoryEstimate", "True"): "Fits in GPU memory (estimated)",
    ("MemoryEstimate", "False"): "May not fit in GPU memory (estimated)",
    ("ResourceEstimate", "False"): "Resources may not fit (estimated)",
    ("NetworkEstimate", "False"): "The network limits training, or its devices are not used (estimated)",
}


def run_list(raws: Iterable[Raw], now: datetime, *, namespaces: bool) -> RenderableType:
    """One line for each run; the note shows what blocks it."""
    table = _table(*(["NAMESPACE"] if namespaces else []), "NAME", "PHASE", "STAGE", "PROGRESS", "AGE", "NOTE")
    table.columns[-3].no_wrap = True
    for raw in sorted(raws, key=lambda each: (each["metadata"]["namespace"], each["metadata"]["name"])):
        metadata, status = raw["metadata"], read_status(raw.get("status") or {})
        told = explain(raw, status, now)
        phase = status.phase or "Pending"
        cells = [metadata["name"], Text(phase, _PHASES.get(phase, "cyan")), status.stage or ""]
        cells += [_progress_words(status), age(metadata.get("creationTimestamp"), now), _note(told, status)]
        table.add_row(*([metadata["namespace"]] if namespaces else []), *cells)
    return table


def run_status(raw: Raw, now: datetime) -> RenderableType:
    """The full status of one run, most important facts first."""
    status = read_status(raw.get("status") or {})
    told = explain(raw, status, now)
    parts: list[RenderableType] = [*_head(raw, status, told, now)]
    for title, part in (
        ("Stages", _stages(status.stages, now)),
        ("Evaluation", _figures(status)),
        ("Checkpoint", _checkpoint(status, now)),
        ("Artifacts", _artifacts(status.artifacts)),
        ("Defaults", _defaults(raw, status)),
        ("Conditions", _conditions(status.conditions, told, now)),
    ):
        if part is not None:
            parts += [Text(), Text(title, "bold"), Padding(part, (0, 0, 0, 2))]
    return Group(*parts)


def explanation(name: str, told: Explanation) -> RenderableType:
    """State, reason and next step, one line each."""
    lines = [Text.assemble((name, "bold"), " ", (told.state, f"bold {_TONES[told.tone]}")), Text(told.because)]
    if told.next_step:
        lines.append(Text.assemble(("next: ", "bold"), told.next_step))
    return Group(*lines)


def event_list(causes: Iterable[Cause], now: datetime) -> RenderableType:
    """One line for each cause, oldest first; `!` marks a warning."""
    table = _table("", "LAST SEEN", "COUNT", "OBJECT", "EVENT")
    table.columns[2].justify = "right"
    for each in causes:
        mark = Text("!", "yellow") if each.warning else Text()
        seen = f"{duration((now - each.last).total_seconds())} ago"
        objects = each.objects[0] + (f" and {len(each.objects) - 1} more" if len(each.objects) > 1 else "")
        event = Text.assemble((each.reason, "yellow" if each.warning else "bold"), ": ", each.message)
        table.add_row(mark, seen, str(each.count), objects, event)
    return table


def cost_table(lines: Iterable[Line], price: float | None) -> RenderableType:
    """The attempts with their GPU-hours and, given the price of one, their cost."""
    money = ["COST"] if price is not None else []
    table = _table("STAGE", "ATTEMPT", "STARTED (UTC)", "TOOK", "GPUS", "GPU-HOURS", *money, "ENDED")
    for column in table.columns[4:-1]:
        column.justify = "right"
    for line in lines:
        figures = [line.gpus, f"{line.gpu_hours:.2f}"]
        figures += [f"{line.gpu_hours * price:.2f}"] if price is not None else []
        style = "bold" if line.is_sum else None
        table.add_row(line.stage, line.attempt, line.started, line.took, *figures, line.ended, style=style)
    return table


def difference_table(found: Iterable[Difference], first: str, second: str) -> RenderableType:
    """One line for each field, with the values of both runs."""
    table = _table("FIELD", first, second)
    for each in found:
        table.add_row(each.field, each.first, each.second)
    return table


def _head(raw: Raw, status: InternVLFineTuneStatus, told: Explanation, now: datetime) -> Iterator[RenderableType]:
    metadata = raw["metadata"]
    name = Text.assemble((metadata["name"], "bold"), f" (namespace {metadata['namespace']}) ")
    yield name + Text(told.state, f"bold {_TONES[told.tone]}")
    facts = [f"created {ago(metadata.get('creationTimestamp'), now)}"]
    if status.attempt > 1:
        restarts = status.restarts
        facts.append(f"attempt {status.attempt}")
        facts.append(f"restarts: {restarts.user} by the run, {restarts.infrastructure} by the infrastructure")
    if status.workers.active:
        facts.append(f"{status.workers.active} pods")
    yield Text(" · ".join(facts), "dim")
    if status.elastic and status.elastic.workers < status.elastic.wanted:
        fewer = f"{status.elastic.workers} of {status.elastic.wanted} workers ({status.elastic.reason}): "
        yield Text(fewer + status.elastic.message, "yellow")
    if status.progress and status.phase in ("Running", "Pending", "Suspended", "Stalled"):
        yield from _progress(status.progress)
    if told.tone != "good":
        yield Text(told.because)
    if told.next_step:
        yield Text.assemble(("next: ", "bold"), told.next_step)


def _progress(progress: Progress) -> Iterator[RenderableType]:
    words = Text("  ".join(_progress_facts(progress)))
    if not progress.step or not progress.total_steps:
        yield words
        return
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_row(
        ProgressBar(total=progress.total_steps, completed=progress.step, width=_BAR),
        Text(f"{progress.step / progress.total_steps:.0%}", "bold"),
        words,
    )
    yield row


def _progress_facts(progress: Progress) -> Iterator[str]:
    if progress.step is not None:
        yield f"step {progress.step}/{progress.total_steps}" if progress.total_steps else f"step {progress.step}"
    elif progress.detail:
        yield progress.detail
    if progress.loss is not None:
        yield f"loss {progress.loss:.3f}"
    if progress.validation_loss is not None:
        yield f"validation loss {progress.validation_loss:.3f}{_best(progress)}"
    if progress.tokens_per_second:
        yield f"{progress.tokens_per_second:,.0f} tokens/s"
    if progress.eta_seconds:
        yield f"{duration(progress.eta_seconds)} left"


def _best(progress: Progress) -> str:
    """The lowest loss so far; empty when it is that of the current step."""
    if progress.best_validation_loss is None or progress.best_step == progress.step:
        return ""
    return f" (lowest {progress.best_validation_loss:.3f} at step {progress.best_step})"


def _progress_words(status: InternVLFineTuneStatus) -> str:
    progress = status.progress
    if progress and progress.step and progress.total_steps and status.phase != "Succeeded":
        left = f"  {duration(progress.eta_seconds)} left" if progress.eta_seconds and status.phase == "Running" else ""
        return f"{progress.step / progress.total_steps:4.0%}  {progress.step}/{progress.total_steps}{left}"
    return (status.progress_text or "") if status.phase != "Succeeded" else ""


def _note(told: Explanation, status: InternVLFineTuneStatus) -> Text:
    if told.tone == "good" or status.phase == "Suspended":
        return Text()
    return Text(told.because.replace("\n", " "), _TONES[told.tone], no_wrap=True, overflow="ellipsis")


def _stages(entries: Sequence[StageStatus], now: datetime) -> RenderableType | None:
    if not entries:
        return None
    table = _table("", "STAGE", "STATE", "STARTED (UTC)", "TOOK", "")
    for entry in entries:
        mark, style = _MARKS.get(entry.state, ("·", "dim"))
        begun = entry.state != "Pending" or entry.started_at
        over = entry.state in ("Pending", "Skipped") and not entry.finished_at
        table.add_row(
            Text(mark, style),
            entry.name,
            Text(entry.state if begun else "Waiting", style),
            clock(entry.started_at, now) if entry.started_at else "",
            "" if over else took(entry.started_at, entry.finished_at, now),
            Text(_stage_note(entry)),
        )
    return table


def _stage_note(entry: StageStatus) -> str:
    attempt = f"attempt {entry.attempt}" if entry.attempt > 1 else ""
    return ": ".join(part for part in (attempt, ending(entry)) if part)


def _figures(status: InternVLFineTuneStatus) -> RenderableType | None:
    measured = status.evaluation
    if measured is None or not (measured.baseline or measured.final):
        return None
    alone = bool(status.stages) and all(entry.name != "train" for entry in status.stages)  # nothing to compare
    table = _table("TASK", "METRIC", *(("VALUE",) if alone else ("BASE", "TUNED", "CHANGE")))
    for task in dict.fromkeys([*measured.baseline, *measured.final]):
        base, tuned = measured.baseline.get(task, {}), measured.final.get(task, {})
        for metric in dict.fromkeys([*base, *tuned]):
            before, after = base.get(metric), tuned.get(metric)
            if alone:
                table.add_row(task, metric, _figure(after))
                continue
            change = f"{after - before:+.4f}" if before is not None and after is not None else ""
            known = change and metric not in ANSWER_METRICS  # of these, more may be better or worse
            style = "" if not known else "green" if change.startswith("+") else "red"
            table.add_row(task, metric, _figure(before), _figure(after), Text(change, style))
    for column in table.columns[2:]:
        column.justify = "right"
    return table


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _checkpoint(status: InternVLFineTuneStatus, now: datetime) -> RenderableType | None:
    newest = status.checkpoint
    if newest is None:
        return None
    return Text(f"step {newest.step}, verified {ago(newest.verified_at, now)}: {newest.uri}")


def _artifacts(artifacts: dict[str, str]) -> RenderableType | None:
    if not artifacts:
        return None
    table = Table.grid(padding=(0, 3, 0, 0))
    for name, uri in artifacts.items():
        table.add_row(name, Text(uri, overflow="fold"))
    return table


def _defaults(raw: Raw, status: InternVLFineTuneStatus) -> RenderableType | None:
    """The fields that the run's namespace or cluster gave it, each with its place."""
    try:
        found = recorded_defaults(status).applied(raw.get("spec") or {})
    except SpecError:  # a newer operator accepted them
        return None
    if not found:
        return None
    table = Table.grid(padding=(0, 3, 0, 0))
    for each in found:
        table.add_row(each.field, Text(_brief(each.value), overflow="fold"), each.place)
    return table


def _brief(value: object) -> str:
    """A value on one line; of a list only the names, as the values of variables may be secret."""
    if isinstance(value, list):
        names = [part.get("name") or part.get("key") or "…" if isinstance(part, dict) else "…" for part in value]
        return printable(", ".join(map(str, names)))
    return shown(value)[:_LONGEST_VALUE]


def _conditions(conditions: Sequence[Condition], told: Explanation, now: datetime) -> RenderableType | None:
    """The conditions worth showing, as sentences; a message shown above is not repeated."""
    lines = []
    above = told.because if told.tone != "good" else ""
    for each in conditions:
        if sentence := _SENTENCES.get((each.type, each.status)):
            since = age(each.last_transition_time, now)
            message = "" if above.endswith(each.message) else f": {each.message}"
            lines.append(Text.assemble(f"{sentence}, for {since}: ", (each.reason, "bold"), message))
    return Group(*lines) if lines else None


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table

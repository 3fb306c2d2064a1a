"""The report as one self-contained HTML page: no network, no script, no other file."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from internvl_api.address import redact
from internvl_api.constants import ENV_IMAGE
from internvl_api.run_config import RunConfig
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from internvl_trainer.report.plots import metric_rows
from internvl_trainer.report.record import Record
from internvl_trainer.report.samples import Sample, data_uri

_SHOWN_FINDINGS = 30
_LIBRARIES = ("torch", "transformers", "deepspeed", "peft")
_CAPTIONS = {
    "metrics.png": "Figures of each task before and after training",
    "loss.png": "Loss over the optimizer steps",
    "learning-rate.png": "Learning rate and gradient norm over the optimizer steps",
    "throughput.png": "Tokens a second and time spent waiting for data",
}


def render_page(
    record: Record, samples: Mapping[str, list[Sample]], light: Iterable[Path], dark: Iterable[Path]
) -> str:
    """The page.

    Args:
        light, dark: the same PNGs, drawn for each kind of page.
    """
    figures = [
        {
            "name": bright.name,
            "caption": _CAPTIONS[bright.name],
            "light": data_uri(bright.read_bytes(), "image/png"),
            "dark": data_uri(dim.read_bytes(), "image/png"),
        }
        for bright, dim in zip(light, dark, strict=True)
    ]
    return page_environment().get_template("page.html.j2").render(
        record=record,
        config=record.config,
        banner=banner(record),
        facts=facts(record),
        metrics=metric_rows(record.baseline, record.final),
        figures=figures,
        samples=samples,
        findings=findings(record),
        lineage=lineage(record),
        run_yaml=record.config.to_yaml(),
        version=version("internvl-trainer"),
    )  # fmt: skip


def banner(record: Record) -> tuple[str, str, str]:
    """(kind: good, bad or open; headline; explanation) of the run's state."""
    verdict = record.verdict
    if verdict and verdict.met is False:
        kept = "adapter" if record.config.method == "lora" else "model"
        text = f"{verdict.explanation}. The {kept} and this report are kept; nothing was published."
        return "bad", "Not published: the publishing condition was not met", text
    if record.trained is None:
        steps = f"up to step {record.steps[-1]['step']}" if record.steps else "no step has been kept yet"
        return "open", "Training is not finished", f"The curves show what the newest checkpoint has: {steps}."
    if verdict and verdict.met is None:
        text = f"publishIf: {verdict.condition}; {verdict.explanation}."
        return "open", "Whether the publishing condition holds cannot be told", text
    if verdict:
        return "good", "The publishing condition was met", f"{verdict.explanation}."
    if record.final:
        return "good", "Trained and evaluated", "No publishing condition was asked for (evaluation.publishIf)."
    if record.config.evaluation.tasks:
        return "open", "Trained", "The trained model has not been evaluated yet."
    return "good", "Trained", "No evaluation was asked for."


def facts(record: Record) -> list[tuple[str, str, str]]:
    """(name, value, note) of the main facts of a run."""
    config, steps = record.config, record.steps
    found = [("Base model", config.model.name or config.model.source.rstrip("/").rpartition("/")[2], _how(config))]
    if steps:
        seconds = sum(row["step_seconds"] for row in steps)
        tokens = sum(row["tokens"] for row in steps)
        found.append(("Steps", f"{steps[-1]['step']:,}", f"{steps[-1]['epoch']:.4g} epochs"))
        found.append(("Training loss", f"{steps[-1]['loss']:.4f}", f"{steps[0]['loss']:.4f} at the start"))
        if held_out := record.validation():
            best_step, best = min(held_out, key=lambda pair: pair[1])
            found.append(("Validation loss", f"{held_out[-1][1]:.4f}", f"lowest {best:.4f}, after step {best_step:,}"))
        found.append(("Time in steps", duration(seconds), "without checkpoints and validation"))
        found.append(("Throughput", f"{tokens / seconds:,.0f} tokens/s", f"{_count_processes(record)}"))
    return found


def findings(record: Record) -> dict[str, Any]:
    """Preflight's findings: counts by reason, and the first ones in full."""
    every = (record.preflight or {}).get("findings", [])
    counts = Counter((each["severity"], each["reason"], each["dataset"]) for each in every)
    return {
        "counts": [(*kind, count) for kind, count in counts.most_common()],
        "first": every[:_SHOWN_FINDINGS],
        "left_out": max(0, len(every) - _SHOWN_FINDINGS),
    }


def lineage(record: Record) -> list[tuple[str, str]]:
    """(what, which): the inputs, settings and versions that this model was made from."""
    config = record.config
    preflight = record.preflight or {}
    rows = [("Base model", config.model.source)]
    rows += [(f"Base model: {name}", str(value)) for name, value in preflight.get("model", {}).items() if value]
    for dataset in preflight.get("datasets", []):
        digest = f", sha256 {dataset['sha256']}" if dataset.get("sha256") else ""
        rows.append((f"Data: {dataset['name']}", f"{dataset['annotation']}{digest}"))
    rows += [(f"Test set: {name}", task.annotation) for name, task in config.evaluation.tasks.items()]
    if record.trained:
        rows.append(
            ("What was trained", f"{record.trained.size / 1e6:,.1f} MB, manifest sha256 {record.trained.sha256}")
        )
    rows += [
        ("Run", f"{config.job} (uid {config.job_uid})"),
        *([("Recipe", config.recipe)] if config.recipe else []),
        ("Output", config.output),
        ("Trainer image", os.environ.get(ENV_IMAGE) or "none: the trainer ran outside of a container"),
        ("Code", f"internvl-trainer {version('internvl-trainer')}, Python {sys.version.split()[0]}"),
        ("Libraries", ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)),
        ("Seed", f"{config.training.seed} (order of rows, dropout, adapter weights, augmentation)"),
    ]
    return rows


def duration(seconds: float | timedelta) -> str:
    """A duration in words: seconds, minutes or hours.

    >>> duration(42.3), duration(754), duration(14_580)
    ('42 s', '12 min 34 s', '4 h 3 min')
    """
    total = round(seconds.total_seconds() if isinstance(seconds, timedelta) else seconds)
    hours, minutes, rest = total // 3600, total % 3600 // 60, total % 60
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{total} s" if total else "below 1 s"


def page_environment() -> Environment:
    """Every value is data: redacted, and escaped for HTML."""
    environment = Environment(
        loader=PackageLoader("internvl_trainer.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: redact(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["figure"] = figure
    environment.filters["difference"] = difference
    environment.filters["duration"] = duration
    environment.filters["moment"] = moment
    return environment


def figure(value: float | None) -> str:
    """A metric's value with the digits people quote."""
    return "–" if value is None else f"{value:.4f}"


def difference(before: float | None, after: float | None) -> str:
    """With its sign; empty unless both are known."""
    return "" if before is None or after is None else f"{after - before:+.4f}".replace("-", "−")


def moment(value: datetime) -> str:
    """To the minute, in UTC."""
    return value.strftime("%Y-%m-%d %H:%M")


def _how(config: RunConfig) -> str:
    if config.method != "lora":
        return f"{config.method} fine-tuning"
    kind = "DoRA" if config.lora.dora else "LoRA"
    ranks = [("language", config.lora.language_rank), ("vision", config.lora.vision_rank)]
    return f"{kind}, rank " + ", ".join(f"{rank} ({tower})" for tower, rank in ranks if rank)


def _count_processes(record: Record) -> str:
    counts = sorted({attempt.processes for attempt in record.attempts})
    text = " or ".join(str(count) for count in counts)
    return f"on {text} process" + ("" if counts == [1] else "es")

"""The report as one self-contained HTML page: no network, no script, no other file."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from internvl_api.address import redact
from internvl_api.constants import ENV_IMAGE
from internvl_api.memory.estimate import memory
from internvl_api.memory.requests import needs
from internvl_api.memory.setup import longest_row, setup_of, typical_row
from internvl_api.quantity import gib
from internvl_api.run_config import RunConfig
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from internvl_trainer.report.comparison import Comparisons, compare
from internvl_trainer.report.head import data_advice, head_facts
from internvl_trainer.report.judgement import evidence, judge
from internvl_trainer.report.published import published
from internvl_trainer.report.record import Record
from internvl_trainer.report.samples import Sample, data_uri
from internvl_trainer.report.strips import make_strips
from internvl_trainer.report.use_it import Use
from internvl_trainer.report.words import difference, duration, figure, interval, moment

_SHOWN_FINDINGS = 30
_LIBRARIES = ("torch", "transformers", "deepspeed", "peft")
_CAPTIONS = {
    "metrics.png": "Figures of each task before and after training",
    "loss.png": "Loss over the optimizer steps",
    "learning-rate.png": "Learning rate and gradient norm over the optimizer steps",
    "throughput.png": "Tokens a second and time spent waiting for data",
}


def render_page(
    record: Record,
    samples: Mapping[str, list[Sample]],
    light: Iterable[Path],
    dark: Iterable[Path],
    uses: Sequence[Use] = (),
) -> str:
    """The page.

    Args:
        light, dark: the same PNGs, drawn for each kind of page.
        uses: commands for the result.
    """
    captions = _CAPTIONS | ({"metrics.png": "Figures of each task"} if record.alone else {})
    figures = [
        {
            "name": bright.name,
            "caption": captions[bright.name],
            "light": data_uri(bright.read_bytes(), "image/png"),
            "dark": data_uri(dim.read_bytes(), "image/png"),
        }
        for bright, dim in zip(light, dark, strict=True)
    ]
    compared = compare(record)
    return page_environment().get_template("page.html.j2").render(
        record=record,
        config=record.config,
        banner=banner(record, compared),
        facts=[*head_facts(record), *facts(record)],
        uses=uses,
        advice=data_advice(record),
        compared=compared,
        published=published(record),
        figures=figures,
        samples=samples,
        strips=make_strips(record),
        findings=findings(record),
        sampled=is_sampled(record),
        lineage=lineage(record),
        run_yaml=record.config.to_yaml(),
        version=version("internvl-trainer"),
    )  # fmt: skip


def banner(record: Record, compared: Comparisons) -> tuple[str, str, str]:
    """(kind: good, bad or open; headline; explanation) of the run's state."""
    verdict = record.verdict
    if verdict and verdict.met is False:
        kept = {"lora": "The adapter and this report are", "none": "This report is"}.get(record.config.method)
        text = f"{verdict.explanation}. {kept or 'The model and this report are'} kept; nothing was published."
        return "bad", "Not published: the publishing condition was not met", text
    if record.alone and not record.final:
        return "open", "Evaluation is not finished", "The figures follow when every question is answered and scored."
    if record.trained is None and not record.alone:
        steps = f"up to step {record.steps[-1]['step']}" if record.steps else "no step has been kept yet"
        return "open", "Training is not finished", f"The curves show what the newest checkpoint has: {steps}."
    if verdict and verdict.met is None:
        text = f"publishIf: {verdict.condition}; {verdict.explanation}."
        return "open", "Whether the publishing condition holds cannot be told", text
    if record.final:
        return _judged(record, compared)
    if record.config.evaluation.tasks:
        return "open", "Trained", "The trained model has not been evaluated yet."
    return "good", "Trained", "No evaluation was asked for."


def _judged(record: Record, compared: Comparisons) -> tuple[str, str, str]:
    """The banner of an evaluated model that may be published: a condition that holds does not make it good."""
    verdict, judgement = record.verdict, judge(evidence(record, compared))
    state = "The publishing condition was met" if verdict else "Evaluated" if record.alone else "Trained and evaluated"
    asked = verdict.explanation if verdict else "No publishing condition was asked for (evaluation.publishIf)"
    reasons = "; ".join(judgement.reasons)
    if judgement.headline:
        return judgement.colour, judgement.headline, f"{reasons}. {state}. {asked}."
    return judgement.colour, state, f"{asked}. {reasons[:1].upper()}{reasons[1:]}." if reasons else f"{asked}."


def facts(record: Record) -> list[tuple[str, str, str]]:
    """(name, value, note) of the main facts of a run."""
    config, steps = record.config, record.steps
    name = config.model.name or config.model.source.rstrip("/").rpartition("/")[2]
    found = [("Model" if record.alone else "Base model", name, _how(config))]
    if steps:
        seconds = sum(row["step_seconds"] for row in steps)
        tokens = sum(row["tokens"] for row in steps)
        found.append(("Steps", f"{steps[-1]['step']:,}", f"{steps[-1]['epoch']:.4g} epochs"))
        found.append(("Training loss", f"{steps[-1]['loss']:.4f}", f"{steps[0]['loss']:.4f} at the start"))
        if (exported := record.exported_step) is not None and exported != steps[-1]["step"]:
            found.append(("Exported step", f"{exported:,}", "chosen by the loss on data.validation"))
        if held_out := record.validation():
            best_step, best = min(held_out, key=lambda pair: pair[1])
            found.append(("Validation loss", f"{held_out[-1][1]:.4f}", f"lowest {best:.4f}, after step {best_step:,}"))
        found.append(("Time in steps", duration(seconds), "without checkpoints and validation"))
        found.append(("Throughput", f"{tokens / seconds:,.0f} tokens/s", f"{_count_processes(record)}"))
    return [*found, *_memory_facts(record), *_bandwidth_facts(record)]


def _memory_facts(record: Record) -> Iterator[tuple[str, str, str]]:
    """What worker 0 used at most, beside the estimates, so that they can be corrected by real runs."""
    progress = record.trained.extra.get("progress") if record.trained else None
    used = progress if isinstance(progress, dict) else {}
    setup, needed = setup_of(record.config), needs(record.config, "train")
    if isinstance(gpu := used.get("peakGpuMemoryBytes"), int):
        typical, longest = (memory(setup, row(setup)).total for row in (typical_row, longest_row)) if setup else (0, 0)
        guess = f"estimated {gib(typical)} to {gib(longest)} with the longest rows" if setup else "of one GPU"
        yield "GPU memory", gib(gpu), guess
    if isinstance(host := used.get("peakMemoryBytes"), int):
        yield "Host memory", gib(host), f"estimated {gib(needed.memory_bytes)}" if needed else "of worker 0"


def _bandwidth_facts(record: Record) -> Iterator[tuple[str, str, str]]:
    """(name, figure, note) of network and storage, as the last attempt that took steps measured them."""
    rates: dict[str, float] = next((row["bandwidth"] for row in reversed(record.steps) if "bandwidth" in row), {})
    if reduced := rates.get("all_reduce"):
        yield "Network", f"{reduced / 1e9:.3g} GB/s", "all-reduce over all processes, bus bandwidth"
    if write := rates.get("storage_write"):
        yield "Storage", f"{write / 1e9:.3g} GB/s", "written by one node at the start of training"


def findings(record: Record) -> dict[str, Any]:
    """Preflight's findings: counts by reason, and the first ones in full."""
    every = (record.preflight or {}).get("findings", [])
    counts = Counter((each["severity"], each["reason"], each["dataset"]) for each in every)
    return {
        "counts": [(*kind, count) for kind, count in counts.most_common()],
        "first": every[:_SHOWN_FINDINGS],
        "left_out": max(0, len(every) - _SHOWN_FINDINGS),
    }


def is_sampled(record: Record) -> bool:
    """Whether preflight left out rows (data.preflight.sample)."""
    datasets = (record.preflight or {}).get("datasets", [])
    return any(each.get("rowsChecked", 0) < each.get("rowsUsed", 0) for each in datasets)


def lineage(record: Record) -> list[tuple[str, str]]:
    """(what, which): the inputs, settings and versions that this model was made from."""
    config = record.config
    preflight = record.preflight or {}
    model = "Model" if record.alone else "Base model"
    rows = [(model, config.model.source)]
    rows += [(f"{model}: {name}", str(value)) for name, value in preflight.get("model", {}).items() if value]
    if config.model.adapter:
        rows.append(("Adapter", config.model.adapter))
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
    ]
    if not record.alone:
        rows.append(("Seed", f"{config.training.seed} (order of rows, dropout, adapter weights, augmentation)"))
    return rows


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
    environment.filters["interval"] = interval
    environment.filters["duration"] = duration
    environment.filters["moment"] = moment
    return environment


def _how(config: RunConfig) -> str:
    if not config.trains:
        return "evaluated with an adapter" if config.model.adapter else "evaluated as it is"
    if config.method != "lora":
        return f"{config.method} fine-tuning"
    kind = "DoRA" if config.lora.dora else "LoRA"
    ranks = [("language", config.lora.language_rank), ("vision", config.lora.vision_rank)]
    return f"{kind}, rank " + ", ".join(f"{rank} ({tower})" for tower, rank in ranks if rank)


def _count_processes(record: Record) -> str:
    counts = sorted({attempt.processes for attempt in record.attempts})
    text = " or ".join(str(count) for count in counts)
    return f"on {text} process" + ("" if counts == [1] else "es")

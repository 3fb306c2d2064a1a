"""The README.md of what was trained: the Hub's metadata, the figures, how to load it, and what it was made of."""

from __future__ import annotations

import re
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCardData
from internvl_api.address import redact
from internvl_api.publish_condition import ANSWER_METRICS
from internvl_api.run_config import RunConfig
from jinja2 import Environment, PackageLoader, StrictUndefined

from internvl_trainer.artifacts import hub
from internvl_trainer.report.comparison import compare
from internvl_trainer.report.contents import Contents, contents
from internvl_trainer.report.page import facts, lineage
from internvl_trainer.report.record import Record, read_record
from internvl_trainer.report.words import difference, figure, interval
from internvl_trainer.stage_store import StageStore

_HUB = re.compile(r"^hf://(datasets/)?(?P<name>[^/]+/[^/@]+)")
_MARKS = re.compile(r"([\\`*_{}\[\]<>|#])")


class _Purpose(NamedTuple):
    """What the Hub calls it: the model's use, and the task that figures are of."""

    pipeline: str
    task: str


_PURPOSES = {
    "chat": _Purpose("image-text-to-text", "image-text-to-text"),
    "retrieval": _Purpose("image-feature-extraction", "image-text-retrieval"),
}


def model_card(stages: StageStore) -> str:
    """The card of this run's results so far; works without an evaluation."""
    return render_card(read_record(stages), contents(stages))


def hub_card(stages: StageStore) -> str:
    """The same for the Hub, where there is one model, at the root of publish.hub.repository."""
    config = stages.config
    there = contents(stages).at_root(config.merge.formats)
    repository = config.publish.hub.repository if config.publish.hub else None
    return render_card(read_record(stages), there, repository)


def render_card(record: Record, there: Contents, repository: str | None = None) -> str:
    """Front matter between two lines of ---, then Markdown. With a `repository`, `there` is what is at its root."""
    config = record.config
    environment = Environment(
        loader=PackageLoader("internvl_trainer.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: redact(value) if isinstance(value, str) else value,
    )
    environment.filters.update(plain=plain, figure=figure, difference=difference, interval=interval)
    body = environment.get_template("model_card.md.j2").render(
        config=config,
        name=name_of(config),
        base=base_model(config),
        record=record,
        there=there,
        facts=facts(record),
        compared=compare(record),
        lineage=lineage(record),
        repository=repository,
        has_code=has_code(config.model.source),
    )
    return f"---\n{redact(metadata(record, there).to_yaml())}\n---\n\n{body}"


def metadata(record: Record, there: Contents) -> ModelCardData:
    """The Hub's metadata of the model, without a base model or data that are not on the Hub."""
    config = record.config
    sources = [dataset.annotation for dataset in config.data.train.values()]
    datasets = [match["name"] for source in sources if (match := _HUB.match(source)) and match[1]]
    base = base_model(config)
    relation = "adapter" if there.adapter and not (there.upstream or there.hf) else "finetune"
    tags = ["internvl", config.method, *(["custom_code"] if there.upstream else [])]
    return ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name="peft" if relation == "adapter" else "transformers",
        pipeline_tag=_PURPOSES[config.model.kind].pipeline,
        tags=tags,
        datasets=list(dict.fromkeys(datasets)) or None,
        model_name=name_of(config) if record.final else None,
        eval_results=_results(record) if record.final else None,
    )


def base_model(config: RunConfig) -> str | None:
    """owner/name on the Hub, when the weights came from there; `model.name` says only which model they resemble."""
    match = _HUB.match(config.model.source)
    return match["name"] if match else None


def has_code(source: str) -> bool:
    """Whether the published model has the *.py of its base; see sources.fetch_directory."""
    return not source.startswith("hf://") or hub.pinned_commit(hub.repository(source, field="model.source")) is not None


def name_of(config: RunConfig) -> str:
    """The Hub's name where it goes there, else the run's."""
    hub = config.publish.hub
    return (hub.repository if hub else config.job).rpartition("/")[2]


def plain(text: object) -> str:
    """Text as one line of Markdown, with all markup escaped."""
    return _MARKS.sub(r"\\\1", " ".join(str(text).split()))


def _results(record: Record) -> list[EvalResult]:
    tasks = record.config.evaluation.tasks
    return [
        EvalResult(
            task_type=_PURPOSES[record.config.model.kind].task,
            dataset_type=tasks[task].task if task in tasks else task,
            dataset_name=task,
            metric_type=metric,
            metric_value=value,
        )
        for task, figures in record.final.items()
        for metric, value in figures.items()
        if metric not in ANSWER_METRICS
    ]

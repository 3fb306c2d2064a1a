"""A run's figures beside those that upstream published: only of the same model, test set, pictures and prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from internvl_api.models.kinds import CAPTION_TOKENS
from internvl_api.recipes.summary import recipe_config
from internvl_api.run_config import RunConfig
from internvl_api.spec.evaluation import TASK_DEFAULTS, EvaluationTask, TaskKind

from internvl_trainer.report.published_figures import RecipeRun, Table, TestSet, published_figures
from internvl_trainer.report.record import Record, Row
from internvl_trainer.retrieval.caption_text import CAPTION_PROMPT

_HUB_MODEL = re.compile(r"hf://(?P<name>[^/@]+/[^/@]+)(@.+)?/?")
_FEWEST_CAPTIONS = 0.99  # a caption that a picture has twice is left out
_NO_EFFECT = {  # settings of training that change speed or memory, not what is learnt
    "micro_batch_size",
    "gradient_checkpointing",
    "zero_stage",
    "deepspeed",
    "data_workers",
    "samples",
    "seed",
}


@dataclass(frozen=True)
class Line:
    """One metric."""

    metric: str
    ours: float
    published: float


@dataclass(frozen=True)
class Block:
    """Figures of one model on one test set, or their average over several.

    Attributes:
        heading: the task, and what was evaluated.
        published_for: the model and the test set that upstream's figures are of, with their source.
    """

    heading: str
    published_for: str
    lines: tuple[Line, ...]


@dataclass
class Published:
    """What can be compared, and why other tasks cannot, as sentences without a full stop."""

    blocks: list[Block] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.blocks or self.reasons)


@dataclass(frozen=True)
class _Evaluated:
    """One evaluation of a run: of its base model, or of the result."""

    name: str
    figures: Mapping[str, Mapping[str, float]]
    answers: Mapping[str, list[Row] | None]
    trained: bool


def published(record: Record) -> Published:
    """Upstream's figures for what this run evaluated; docs/report.md has the rule."""
    found = Published()
    for evaluated in _evaluations(record):
        for table in published_figures().tables:
            if _is_of(table, record.config, trained=evaluated.trained):
                _compare(record, evaluated, table, found)
    return found


def _evaluations(record: Record) -> Iterator[_Evaluated]:
    before = {task: answers[0] for task, answers in record.predictions.items()}
    after = {task: answers[1] for task, answers in record.predictions.items()}
    yield _Evaluated("base model", record.baseline, before, trained=False)
    yield _Evaluated(record.evaluated, record.final, after, trained=record.config.trains)


def _is_of(table: Table, config: RunConfig, *, trained: bool) -> bool:
    """Whether a table is of the evaluated weights, as far as model and recipe say."""
    match = _HUB_MODEL.fullmatch(config.model.source)
    name = match["name"] if match else None
    if trained:
        return table.recipe is not None and (table.recipe.name, table.recipe.base) == (config.recipe, name)
    return name is not None and name == table.model and config.model.adapter is None


def _compare(record: Record, evaluated: _Evaluated, table: Table, found: Published) -> None:
    tasks = record.config.evaluation.tasks
    same: dict[TaskKind, list[str]] = {}
    for name, task in tasks.items():
        if task.task not in table.figures or name not in evaluated.figures:
            continue
        reason = _difference(record, table, name, evaluated.answers.get(name) or [], trained=evaluated.trained)
        if reason:
            found.reasons.append(f"{name}, {evaluated.name}: {reason}")
        else:
            same.setdefault(task.task, []).append(name)
            found.blocks.append(_block(evaluated, table, name, task.task))
    if len(table.figures) > 1 and all(len(same.get(kind, ())) == 1 for kind in table.figures):
        found.blocks.extend(_average(evaluated, table, {kind: names[0] for kind, names in same.items()}))


def _block(evaluated: _Evaluated, table: Table, name: str, kind: TaskKind) -> Block:
    ours, published = evaluated.figures[name], table.of(kind)
    lines = [Line(metric, ours[metric], value) for metric, value in published.items() if metric in ours]
    return Block(
        f"{name}, {evaluated.name}",
        f"{_model_of(table)}, {published_figures().test_sets[kind].title}; {table.source}",
        (*lines, *_means([(ours, published)])),
    )


def _average(evaluated: _Evaluated, table: Table, names: Mapping[TaskKind, str]) -> Iterator[Block]:
    lines = _means([(evaluated.figures[name], table.of(kind)) for kind, name in names.items()])
    if lines:
        titles = " and ".join(published_figures().test_sets[kind].title for kind in names)
        yield Block(
            f"{' and '.join(names.values())}, {evaluated.name}", f"{_model_of(table)}, {titles}; {table.source}", lines
        )


def _means(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> tuple[Line, ...]:
    """The mean of all R@k of InternVL-C and of InternVL-G, which upstream's tables call avg; none for captions."""
    lines = []
    for variant in ("C", "G"):
        metrics = [metric for metric in pairs[0][1] if metric.startswith(f"{variant}_")]
        if metrics and all(metric in ours for ours, _ in pairs for metric in metrics):
            ours, published = (fmean(pair[side][metric] for pair in pairs for metric in metrics) for side in (0, 1))
            lines.append(Line(f"{variant}, mean of {len(metrics) * len(pairs)} R@k", ours, published))
    return tuple(lines)


def _model_of(table: Table) -> str:
    return table.model or (f"recipe {table.recipe.name}" if table.recipe else "")


def _difference(record: Record, table: Table, name: str, rows: list[Row], *, trained: bool) -> str | None:
    """Why a task is not the published one; None when it is."""
    config = record.config
    task = config.evaluation.tasks[name]
    return (
        _other_settings(config, table, task)
        or _other_rows(published_figures().test_sets[task.task], rows)
        or _other_prompts(config, task, rows)
        or (_other_training(record, table.recipe) if trained and table.recipe else None)
    )


def _other_settings(config: RunConfig, table: Table, task: EvaluationTask) -> str | None:
    defaults = TASK_DEFAULTS[task.task]
    wanted, image = table.image, config.image
    if task.limit is not None:
        return f"limit is {task.limit:,}, so only part of the test set was evaluated"
    if (task.min_new_tokens, task.max_new_tokens) != (defaults.min_new_tokens, defaults.max_new_tokens):
        return "minNewTokens or maxNewTokens is not the task's default"
    if task.beams is not None:
        return "beams is set; upstream's figures are with the default"
    if image.tile_size not in (None, wanted.tile_size):
        return f"image.tileSize is {image.tile_size}; upstream's figures are with {wanted.tile_size}"
    if image.exif != "ignore":
        return f"image.exif is {image.exif}; upstream ignores it"
    if config.model.kind == "chat" and (image.tiling != wanted.tiling or task.max_dynamic_patch is not None):
        return (
            f"pictures are cut otherwise; upstream's figures are with image.maxDynamicPatch {wanted.max_dynamic_patch}"
        )
    if defaults.format and config.data.compat != "upstream":
        return "captions were read in lower case and without punctuation; set data.compat: upstream"
    if defaults.format and config.training.max_seq_length != CAPTION_TOKENS:
        return (
            f"training.maxSeqLength is {config.training.max_seq_length}; upstream's figures are with {CAPTION_TOKENS}"
        )
    return None


def _other_rows(test_set: TestSet, rows: Sequence[Row]) -> str | None:
    captions = sum(len(row.get("references") or ()) for row in rows)
    if len(rows) != test_set.pictures or not _FEWEST_CAPTIONS * test_set.captions <= captions <= test_set.captions:
        return (
            f"found {len(rows):,} pictures with {captions:,} captions; {test_set.title} has {test_set.pictures:,} with "
            f"{test_set.captions:,}"
        )
    names = [str(row.get("image")).rpartition("/")[2] for row in rows]
    if other := next((each for each in names if not re.fullmatch(test_set.names, each)), None):
        return f"{other[:60]!r} is not the name of a picture of {test_set.title}"
    return None


def _other_prompts(config: RunConfig, task: EvaluationTask, rows: Sequence[Row]) -> str | None:
    default = TASK_DEFAULTS[task.task].prompt
    if default is None:
        return None
    expected = CAPTION_PROMPT if config.model.kind == "retrieval" else default
    return None if {row.get("question") for row in rows} == {expected} else f"the prompt is not {expected!r}"


def _other_training(record: Record, recipe: RecipeRun) -> str | None:
    """Why a run is not the recipe's: a setting that decides what is learnt, or other rows."""
    config, original = record.config, recipe_config(recipe.name)
    if changed := next(_changed_settings(config, original), None):
        return f"{changed} is not the recipe's"
    datasets: list[Any] = [
        each for each in (record.preflight or {}).get("datasets", []) if not each["name"].startswith("validation/")
    ]
    rows = sum(each["rowsInEpoch"] for each in datasets)
    if not _FEWEST_CAPTIONS * recipe.rows <= rows <= recipe.rows:
        return f"an epoch of training has {rows:,} rows; upstream's has {recipe.rows:,}"
    return None


def _changed_settings(config: RunConfig, original: RunConfig) -> Iterator[str]:
    """Field names, such as training.epochs."""
    for section in ("method", "image", "lora", "retrieval"):
        if getattr(config, section) != getattr(original, section):
            yield section
    if config.model.drop_path_rate != original.model.drop_path_rate:
        yield "model.dropPathRate"
    for name, info in type(config.training).model_fields.items():
        if name not in _NO_EFFECT and getattr(config.training, name) != getattr(original.training, name):
            yield f"training.{info.alias}"
    pairs, own = (each.training.micro_batch_size * each.world_size for each in (original, config))
    if config.model.kind == "retrieval" and pairs != own:
        yield f"the number of pairs in one forward pass ({own})"

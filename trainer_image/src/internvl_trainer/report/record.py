"""The data of the report, read from the stages' results in storage. Missing stages are left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any, NamedTuple

from internvl_api.pipeline import SCORED_BY, AnsweringStage
from internvl_api.publish_condition import ConditionError, Figures, holds
from internvl_api.run_config import RunConfig
from internvl_api.status import EvaluationStatus, StageName

from internvl_trainer.artifacts.manifest import Manifest, ManifestError, read_manifest
from internvl_trainer.artifacts.output_layout import (
    JOURNAL,
    METRICS_FILE,
    PREDICTIONS,
    PREFLIGHT,
    SAMPLES_FILE,
    SAMPLES_FOLDER,
    stored_checkpoints,
)
from internvl_trainer.stage_store import StageStore, stages_of

Row = dict[str, Any]
"""A line of metrics.jsonl, or of a predictions file."""


@dataclass(frozen=True)
class Verdict:
    """The result of the publishing condition; `met` is None while it is unknown."""

    condition: str
    met: bool | None
    explanation: str


@dataclass(frozen=True)
class StageEnd:
    """A stage of the run; `took` is the time since the end of the stage before it."""

    name: StageName
    finished: datetime | None
    took: timedelta | None


@dataclass(frozen=True)
class Attempt:
    """Steps in a row that one attempt took, of those that were kept; times are in seconds."""

    number: int
    first_step: int
    last_step: int
    processes: int
    seconds: float


@dataclass(frozen=True)
class Record:
    """The stored results of a run.

    Attributes:
        steps: rows of metrics.jsonl; those up to the newest checkpoint while training has not ended.
        trained: the manifest of what training made, when that stage is done.
        predictions: task to the rows before (None: not asked for, or not there) and after.
        sample_rounds: the rows of samples.jsonl, each the answers after one step.
        sample_pictures: row to JPEG.
    """

    config: RunConfig
    steps: list[Row] = field(default_factory=list)
    trained: Manifest | None = None
    baseline: Figures = field(default_factory=dict)
    final: Figures = field(default_factory=dict)
    predictions: dict[str, tuple[list[Row] | None, list[Row] | None]] = field(default_factory=dict)
    preflight: dict[str, Any] | None = None
    stages: list[StageEnd] = field(default_factory=list)
    sample_rounds: list[Row] = field(default_factory=list)
    sample_pictures: dict[int, bytes] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether the run only evaluates, so that there is nothing to compare."""
        return not self.config.trains

    @property
    def evaluated(self) -> str:
        """What the final figures are of, in words."""
        return "model" if self.alone else "trained model"

    @property
    def verdict(self) -> Verdict | None:
        """None without spec.evaluation.publishIf."""
        condition = self.config.evaluation.publish_if
        if condition is None:
            return None
        if not self.final:
            return Verdict(condition, None, f"the {self.evaluated} has not been evaluated yet")
        try:
            return Verdict(condition, *holds(condition, self.final, self.baseline))
        except ConditionError as error:
            return Verdict(condition, None, str(error))

    @property
    def warnings(self) -> list[str]:
        """Warnings of training about the loss."""
        return [row["warning"] for row in self.steps if "warning" in row]

    @property
    def exported_step(self) -> int | None:
        """The step whose weights were exported; None before, and in manifests of earlier versions."""
        exported = self.trained.extra.get("exported") if self.trained else None
        return exported.get("step") if isinstance(exported, dict) else None

    @property
    def notes(self) -> list[str]:
        """Sentences: why training ended early, and which step was exported for its validation loss."""
        trained = self.trained.extra if self.trained else {}
        ended = [row["ended_early"] for row in self.steps if "ended_early" in row]
        found = [f"Training {each}." for each in ended]
        if note := (trained.get("exported") or {}).get("note"):
            found.append(f"The run {note}.")
        return found

    @property
    def attempts(self) -> list[Attempt]:
        """In the order of their steps."""
        groups = groupby(self.steps, key=lambda row: (row.get("attempt", 1), row["world_size"]))
        return [_attempt(number, processes, list(rows)) for (number, processes), rows in groups]

    def validation(self) -> list[tuple[int, float]]:
        """(step, loss on data.validation) where it was taken."""
        return [(row["step"], row["validation_loss"]) for row in self.steps if "validation_loss" in row]


def read_record(stages: StageStore) -> Record:
    """This run's results under its output; stages of another run are ignored."""
    # The report is one of the published files, so publish is never done while it is written.
    config = stages.config
    shown = [stage for stage in stages_of(config) if stage != "publish"]
    manifests: dict[StageName, Manifest | None] = {stage: stages.find(stage) for stage in shown}
    trained = manifests.get("train")
    log = _find_log(stages, trained)
    rounds, pictures = _read_samples(stages, log)
    before, after = (_figures(_newest(manifests, answering)) for answering in SCORED_BY)
    return Record(
        config=config,
        steps=read_lines(stages.storage.read(f"{log.key}{METRICS_FILE}")) if log else [],
        sample_rounds=rounds,
        sample_pictures=pictures,
        trained=trained,
        baseline=before.baseline,
        final=after.final,
        predictions={
            task: (
                _read_predictions(stages, "baseline-evaluate", task, manifests),
                _read_predictions(stages, "evaluate", task, manifests),
            )
            for task in config.evaluation.tasks
        },
        preflight=_read_preflight(stages),
        stages=list(_ends(manifests)),
    )


def read_lines(data: bytes) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def pair_rows(before: list[Row] | None, after: list[Row] | None) -> list[tuple[Row | None, Row | None]]:
    """The rows of both files that answer the same question, in the order of the newer file."""
    if after is None:
        return [(row, None) for row in before or ()]
    found = {_key(row): row for row in before or ()}
    return [(found.get(_key(row)), row) for row in after]


def _key(row: Row) -> str:
    return json.dumps([row.get("id"), row.get("image"), row.get("question")], sort_keys=True)


def _figures(manifest: Manifest | None) -> EvaluationStatus:
    return EvaluationStatus.model_validate((manifest.extra.get("evaluation") if manifest else None) or {})


class _Log(NamedTuple):
    """Where the newest metrics log is.

    Attributes:
        key: the start of its files' keys in the storage.
        manifest: the one that lists them.
        prefix: the start of their paths in the manifest.
    """

    key: str
    manifest: Manifest
    prefix: str


def _find_log(stages: StageStore, trained: Manifest | None) -> _Log | None:
    """The metrics log of the train stage, else of the newest checkpoint of this run; None without either."""
    storage = stages.storage
    if trained is not None:
        return _Log(f"{stages.key('train')}/", trained, "")
    for folder in stored_checkpoints(storage):
        try:
            manifest = read_manifest(storage, folder)
        except ManifestError:
            continue
        if manifest is not None and manifest.fingerprint == stages.fingerprint("train"):
            return _Log(f"{folder}/{JOURNAL}/", manifest, f"{JOURNAL}/")
    return None


def _read_samples(stages: StageStore, log: _Log | None) -> tuple[list[Row], dict[int, bytes]]:
    """The rounds of answers during training, and row to JPEG."""
    names = {file.path.removeprefix(log.prefix) for file in log.manifest.files} if log else set()
    if log is None or SAMPLES_FILE not in names:
        return [], {}
    rounds = read_lines(stages.storage.read(f"{log.key}{SAMPLES_FILE}"))
    pictures = {row: f"{SAMPLES_FOLDER}/{row}.jpg" for row in (each["row"] for each in rounds[0]["answers"])}
    return rounds, {row: stages.storage.read(log.key + name) for row, name in pictures.items() if name in names}


def _newest(manifests: Mapping[StageName, Manifest | None], answering: AnsweringStage) -> Manifest | None:
    """The manifest with the most figures of an evaluation: of its scores, else of its answers."""
    return manifests.get(SCORED_BY[answering]) or manifests.get(answering)


def _read_predictions(
    stages: StageStore, answering: AnsweringStage, task: str, manifests: Mapping[StageName, Manifest | None]
) -> list[Row] | None:
    """A task's rows, with their scores as soon as there are some."""
    name = f"{PREDICTIONS}/{task}.jsonl"
    for stage in (SCORED_BY[answering], answering):
        manifest = manifests.get(stage)
        if manifest is not None and name in {file.path for file in manifest.files}:
            return read_lines(stages.storage.read(stages.key(stage, name)))
    return None


def _read_preflight(stages: StageStore) -> dict[str, Any] | None:
    """preflight.json, also of a preflight that refused the rows: its findings are what a person wants to see."""
    key = stages.key("preflight", PREFLIGHT)
    if stages.storage.stat(key) is None:
        return None
    document: dict[str, Any] = json.loads(stages.storage.read(key))
    return document


def _ends(manifests: dict[StageName, Manifest | None]) -> Iterator[StageEnd]:
    before: datetime | None = None
    for name, manifest in manifests.items():
        end = datetime.fromisoformat(manifest.created) if manifest else None
        yield StageEnd(name, end, end - before if end and before and end >= before else None)
        before = end


def _attempt(number: int, processes: int, rows: list[Row]) -> Attempt:
    seconds = sum(row["step_seconds"] for row in rows)
    return Attempt(number, rows[0]["step"], rows[-1]["step"], processes, seconds)

"""The data of the report, read from the stages' results in storage. Missing stages are left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any

from internvl_api.publish_condition import ConditionError, Figures, holds
from internvl_api.run_config import RunConfig
from internvl_api.status import EvaluationStatus, StageName

from internvl_trainer.artifacts.manifest import Manifest, ManifestError, read_manifest
from internvl_trainer.artifacts.output_layout import JOURNAL, METRICS_FILE, PREDICTIONS, PREFLIGHT, stored_checkpoints
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
    """

    config: RunConfig
    steps: list[Row] = field(default_factory=list)
    trained: Manifest | None = None
    baseline: Figures = field(default_factory=dict)
    final: Figures = field(default_factory=dict)
    predictions: dict[str, tuple[list[Row] | None, list[Row] | None]] = field(default_factory=dict)
    preflight: dict[str, Any] | None = None
    stages: list[StageEnd] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict | None:
        """None without spec.evaluation.publishIf."""
        condition = self.config.evaluation.publish_if
        if condition is None:
            return None
        if not self.final:
            return Verdict(condition, None, "the trained model has not been evaluated yet")
        try:
            return Verdict(condition, *holds(condition, self.final, self.baseline))
        except ConditionError as error:
            return Verdict(condition, None, str(error))

    @property
    def warnings(self) -> list[str]:
        """Warnings of training about the loss."""
        return [row["warning"] for row in self.steps if "warning" in row]

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
    before, after = (_figures(manifests.get(stage)) for stage in ("baseline-evaluate", "evaluate"))
    return Record(
        config=config,
        steps=_read_steps(stages, manifests["train"]),
        trained=manifests["train"],
        baseline=before.baseline,
        final=after.final,
        predictions={
            task: (
                _read_predictions(stages, "baseline-evaluate", task, manifests.get("baseline-evaluate")),
                _read_predictions(stages, "evaluate", task, manifests.get("evaluate")),
            )
            for task in config.evaluation.tasks
        },
        preflight=_read_preflight(stages),
        stages=list(_ends(manifests)),
    )


def read_lines(data: bytes) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def _figures(manifest: Manifest | None) -> EvaluationStatus:
    return EvaluationStatus.model_validate((manifest.extra.get("evaluation") if manifest else None) or {})


def _read_steps(stages: StageStore, trained: Manifest | None) -> list[Row]:
    """The rows of the train stage, else of the newest checkpoint of this run."""
    storage = stages.storage
    if trained is not None:
        return read_lines(storage.read(stages.key("train", METRICS_FILE)))
    for folder in stored_checkpoints(storage):
        try:
            manifest = read_manifest(storage, folder)
        except ManifestError:
            continue
        if manifest is not None and manifest.fingerprint == stages.fingerprint("train"):
            return read_lines(storage.read(f"{folder}/{JOURNAL}/{METRICS_FILE}"))
    return []


def _read_predictions(stages: StageStore, stage: StageName, task: str, manifest: Manifest | None) -> list[Row] | None:
    name = f"{PREDICTIONS}/{task}.jsonl"
    if manifest is None or name not in {file.path for file in manifest.files}:
        return None
    return read_lines(stages.storage.read(stages.key(stage, name)))


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

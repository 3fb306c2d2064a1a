"""The files that a run publishes: those its stages stored, and its record, which is written here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_api.pipeline import SCORED_BY, answering_stage
from internvl_api.status import EvaluationStatus, StageName

from internvl_trainer.artifacts.manifest import Manifest, ManifestFile, describe
from internvl_trainer.artifacts.output_layout import (
    EVALUATION,
    HUB_CARD,
    MODEL_CARD,
    PREDICTIONS,
    PREFLIGHT,
    REPORT,
    RUN_CONFIG,
    SERVE,
)
from internvl_trainer.stage_store import StageStore, stages_of

Manifests = Mapping[StageName, Manifest]


@dataclass(frozen=True)
class Item:
    """A file to publish. `origin` is its key in the same storage, or a path on this machine."""

    file: ManifestFile
    origin: str | Path


def finished_stages(stages: StageStore) -> dict[StageName, Manifest]:
    """Manifests of the stages before publish. Raises UserError naming the first that is not done.

    Preflight and doctor are optional for users who start the stages by hand.
    """
    wanted, optional = stages_of(stages.config)[:-1], ("preflight", "doctor")
    return {stage: stages.require(stage) for stage in wanted if stage not in optional or stages.has_manifest(stage)}


def evaluation_of(made: Manifests) -> EvaluationStatus:
    """The figures of both evaluations: a scoring stage has all of its own."""
    baseline, final = (
        EvaluationStatus.model_validate(found.extra["evaluation"]) if found else EvaluationStatus()
        for found in (made.get(scored_by) or made.get(answering) for answering, scored_by in SCORED_BY.items())
    )
    return EvaluationStatus(baseline=baseline.baseline, final=final.final)


def stored_items(stages: StageStore, made: Manifests) -> list[Item]:
    """Weights, predictions, metrics of every step and findings, where the stages stored them."""
    items = {item.file.path: item for stage in made for item in _of_stage(stages, stage, made)}
    return list(items.values())


def recorded_items(stages: StageStore, made: Manifests, scratch: Path, stored: Sequence[Item] = ()) -> list[Item]:
    """run.yaml, evaluation.json, serve.yaml, the report and the cards of a trained model, written into `scratch`.

    `stored`: the files that the stages stored, which serve.yaml is about.
    """
    from internvl_trainer.report.build import build_report
    from internvl_trainer.report.model_card import hub_card, model_card
    from internvl_trainer.report.serve import inference_service

    config = stages.config
    texts = {RUN_CONFIG: config.to_yaml()}
    if "train" in made:
        texts[MODEL_CARD] = model_card(stages)
    if service := inference_service(config, {item.file.path: item.file.size for item in stored}):
        texts[SERVE] = service
    if config.publish.hub:
        texts[HUB_CARD] = hub_card(stages)
    if "evaluate" in made:
        figures = evaluation_of(made)
        document = {
            "baseline": figures.baseline,
            "final": figures.final,
            "condition": config.evaluation.publish_if,
        }
        texts[EVALUATION] = json.dumps(document, indent=1, sort_keys=True) + "\n"
    for name, text in texts.items():
        (scratch / name).write_text(text, encoding="utf-8")
    (scratch / REPORT).mkdir()
    build_report(stages, scratch / REPORT)
    paths = sorted(path for path in scratch.rglob("*") if path.is_file())
    return [Item(describe(path.relative_to(scratch).as_posix(), path), path) for path in paths]


def _of_stage(stages: StageStore, stage: StageName, made: Manifests) -> Iterator[Item]:
    for file in made[stage].files:
        if name := _published_name(stage, file.path, made):
            yield Item(ManifestFile(name, file.size, file.sha256), stages.key(stage, file.path))


def _published_name(stage: StageName, path: str, made: Manifests) -> str | None:
    """Where a stage's file is published; None for files that only stages need."""
    match stage:
        case "preflight":
            return path if path == PREFLIGHT else None
        case "baseline-evaluate" | "evaluate" | "baseline-score" | "score":  # scored captions replace the plain ones
            folder, _, name = path.partition("/")
            return f"{PREDICTIONS}/{answering_stage(stage) or stage}/{name}" if folder == PREDICTIONS else None
        case "doctor":
            return None
        case "train":
            replaced = path.startswith("model/") and "merge" in made and made["merge"].named("model/")
            return None if replaced else path
        case _:
            return path

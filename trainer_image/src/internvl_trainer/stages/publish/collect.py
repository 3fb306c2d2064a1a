"""What a run publishes: files that its stages left in storage, and the record of it, which is made here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from internvl_api.pipeline import stage_names
from internvl_api.run_config import RunConfig
from internvl_api.status import EvaluationStatus, StageName

from internvl_trainer.artifacts.fingerprint import stage_folder
from internvl_trainer.artifacts.manifest import MANIFEST, Manifest, ManifestFile, describe
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.stage_store import finished_stage

Manifests = Mapping[StageName, Manifest]

EVALUATION = "evaluation.json"
HUB_CARD = "README.hub.md"
MODEL_CARD = "README.md"
PREFLIGHT = "preflight.json"
REPORT = "report"
RUN_CONFIG = "run.yaml"
MODEL_FOLDERS = {"upstream": "model/", "hf": "model-hf/"}


@dataclass(frozen=True)
class Item:
    """A file to publish. `origin` is its key in the same storage, or a path on this machine."""

    file: ManifestFile
    origin: str | Path


def finished_stages(config: RunConfig, storage: Storage) -> dict[StageName, Manifest]:
    """Manifests of the stages before publish. Raises UserError naming the first that is not done.

    Whoever starts the stages by hand may leave preflight out.
    """
    wanted = stage_names(config.method, config.evaluation, config.merge)[:-1]
    has_preflight = storage.stat(f"{stage_folder('preflight')}/{MANIFEST}") is not None
    return {stage: finished_stage(stage, config, storage) for stage in wanted if stage != "preflight" or has_preflight}


def evaluation_of(made: Manifests) -> EvaluationStatus:
    """What the evaluation stages measured."""
    baseline, final = (
        EvaluationStatus.model_validate(made[stage].extra["evaluation"]) if stage in made else EvaluationStatus()
        for stage in ("baseline-evaluate", "evaluate")
    )
    return EvaluationStatus(baseline=baseline.baseline, final=final.final)


def stored_items(made: Manifests) -> list[Item]:
    """Weights, predictions, figures of every step and findings, where the stages left them."""
    items = {item.file.path: item for stage, manifest in made.items() for item in _of_stage(stage, manifest, made)}
    return list(items.values())


def recorded_items(config: RunConfig, storage: Storage, made: Manifests, scratch: Path) -> list[Item]:
    """run.yaml, evaluation.json, the report and the model cards, written to `scratch`."""
    from internvl_trainer.report.build import build_report
    from internvl_trainer.report.model_card import hub_card, model_card

    texts = {RUN_CONFIG: config.to_yaml(), MODEL_CARD: model_card(config, storage)}
    if config.publish.hub:
        texts[HUB_CARD] = hub_card(config, storage)
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
    build_report(config, storage, scratch / REPORT)
    paths = sorted(path for path in scratch.rglob("*") if path.is_file())
    return [Item(describe(path.relative_to(scratch).as_posix(), path), path) for path in paths]


def _of_stage(stage: StageName, manifest: Manifest, made: Manifests) -> Iterator[Item]:
    for file in manifest.files:
        if name := _published_name(stage, file.path, made):
            yield Item(ManifestFile(name, file.size, file.sha256), f"{stage_folder(stage)}/{file.path}")


def _published_name(stage: StageName, path: str, made: Manifests) -> str | None:
    """Where a stage's file goes; None for what only the stages themselves need."""
    match stage:
        case "preflight":
            return path if path == PREFLIGHT else None
        case "baseline-evaluate" | "evaluate":
            folder, _, name = path.partition("/")
            return f"predictions/{stage}/{name}" if folder == "predictions" else None
        case "train":
            replaced = path.startswith("model/") and "merge" in made and made["merge"].named("model/")
            return None if replaced else path
        case _:
            return path

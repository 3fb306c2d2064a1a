"""The publish stage: what training made, checked, together with its record, under artifacts/."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from internvl_api.run_config import RunConfig
from internvl_api.status import StageResult

from internvl_trainer.artifacts.identity import claim_output, fingerprint, stage_folder
from internvl_trainer.artifacts.manifest import (
    Manifest,
    ManifestFile,
    commit,
    copy_files,
    discard,
    fetch_files,
    read_manifest,
    upload_files,
)
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.errors import UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.report.model_card import CARD, model_card
from internvl_trainer.report.run import build_report

logger = logging.getLogger(__name__)

FOLDER = "artifacts"
METRICS = "metrics.jsonl"
PREFLIGHT = "preflight.json"


def publish(config: RunConfig, storage: Storage, reporter: Reporter) -> StageResult:
    """Copy, check, and commit; on a second attempt what a killed one left is replaced."""
    trained = _finished(storage, "train", config)
    reporter.doing("copying the result")
    discard(storage, FOLDER)
    copy_files(storage, stage_folder("train"), FOLDER, trained.files)
    files = [*trained.files, *_add_record(config, storage)]
    reporter.doing("checking every file")
    verify_files(storage, FOLDER, files)
    claim_output(storage, config)
    manifest = commit(storage, FOLDER, files, fingerprint(config, "publish"), kind=trained.extra["kind"])
    artifacts = name_artifacts(storage, manifest)
    commit(storage, stage_folder("publish"), [], fingerprint(config, "publish"), artifacts=artifacts)
    return StageResult(
        stage="publish",
        outcome="succeeded",
        reason="Published",
        message=f"{len(files)} files, {manifest.size / 1e6:.1f} MB in {storage.uri}/{FOLDER}",
        artifacts=artifacts,
    )


def verify_files(storage: Storage, folder: str, files: list[ManifestFile]) -> None:
    """Read every stored file back and compare its sha256; one file at a time is on the scratch disk."""
    for file in files:
        with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
            fetch_files(storage, folder, [file], Path(scratch))


def name_artifacts(storage: Storage, manifest: Manifest) -> dict[str, str]:
    """What a user looks for, by name, to its URI."""
    places = {
        manifest.extra["kind"]: manifest.extra["kind"],
        "tensorboard": "tensorboard",
        "runConfig": "run.yaml",
        "preflight": PREFLIGHT,
        "metrics": METRICS,
        "report": "report/index.html",
        "lossCurve": "report/loss.png",
    }
    present = {name: place for name, place in places.items() if manifest.named(place)}
    return {name: f"{storage.uri}/{FOLDER}/{place}" for name, place in present.items()}


def _add_record(config: RunConfig, storage: Storage) -> list[ManifestFile]:
    """run.yaml, preflight.json, the report and the model card, beside the result."""
    with tempfile.TemporaryDirectory(prefix="publish-") as scratch:
        folder = Path(scratch)
        (folder / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
        (folder / CARD).write_text(model_card(config, storage), encoding="utf-8")
        report = build_report(config, storage, folder / "report")
        names = ["run.yaml", CARD, *(path.relative_to(folder).as_posix() for path in report)]
        if storage.stat(f"{stage_folder('preflight')}/{PREFLIGHT}"):
            storage.download(f"{stage_folder('preflight')}/{PREFLIGHT}", folder / PREFLIGHT)
            names.append(PREFLIGHT)
        return upload_files(storage, FOLDER, {name: folder / name for name in names})


def _finished(storage: Storage, stage: str, config: RunConfig) -> Manifest:
    manifest = read_manifest(storage, stage_folder(stage))
    if manifest is None or manifest.fingerprint != fingerprint(config):
        raise UserError(
            "StageMissing",
            f"found no finished {stage} stage of this run under {storage.uri}; run `internvl-trainer {stage}` first",
            "spec.output",
        )
    return manifest

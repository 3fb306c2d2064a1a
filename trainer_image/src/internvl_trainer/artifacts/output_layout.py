"""Names of the files that a run keeps under spec.output, and the list of its checkpoints."""

from __future__ import annotations

import re

from internvl_trainer.artifacts.manifest import MANIFEST, ManifestError, read_manifest
from internvl_trainer.artifacts.storage import Storage

RUN_FILE = "run.json"
LEASE_FILE = "lease.json"

CHECKPOINTS = "checkpoints"
CHECKPOINT_KEY = re.compile(rf"^{CHECKPOINTS}/step-(\d+)(?:\.\d+)?/")
JOURNAL = "journal"
"""A checkpoint's copy of the metrics log."""

PREFLIGHT = "preflight.json"
METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
SAMPLES_FILE = "samples.jsonl"
"""Answers to a few held-out rows during training; their pictures are in `samples/`, by the row's number."""
SAMPLES_FOLDER = "samples"
PREDICTIONS = "predictions"
SCORES = "scores.json"

BANDWIDTH = "bandwidth"
"""Files that training writes and removes at its start, to measure the storage."""

DIAGNOSTICS = "diagnostics"
"""Recordings of failed attempts, which no stage reads."""

ARTIFACTS = "artifacts"
EVALUATION = "evaluation.json"
HUB_CARD = "README.hub.md"
MODEL_CARD = "README.md"
REPORT = "report"
REPORT_PAGE = "index.html"
RUN_CONFIG = "run.yaml"
SERVE = "serve.yaml"
MODEL_FOLDERS = {"upstream": "model/", "hf": "model-hf/"}


def checkpoint_folder(step: int, epoch: int | None = None) -> str:
    """Where the checkpoint after `step` steps is, of the writer that has the output's lease with this epoch.

    Each writer has folders of its own: a late request of an earlier one never changes a checkpoint of a later one.
    """
    return f"{CHECKPOINTS}/step-{step:08d}" + ("" if epoch is None else f".{epoch:06d}")


def stored_checkpoints(storage: Storage, step: int | None = None) -> list[str]:
    """Folders of the checkpoints that have a manifest, newest first; with `step` only those of this step."""
    keys = (file.key for file in storage.list(f"{CHECKPOINTS}/") if file.key.endswith(f"/{MANIFEST}"))
    found = sorted((key.removesuffix(f"/{MANIFEST}") for key in keys if CHECKPOINT_KEY.match(key)), reverse=True)
    return [folder for folder in found if step in (None, _step_of(folder))]


def kept_checkpoints(storage: Storage, keep: int, *, with_best: bool) -> list[str]:
    """Folders of the newest `keep` checkpoints, newest first, then of the best ones.

    Args:
        with_best: keep also, for each of the newest, the step that had the lowest loss on data.validation when it was
            saved: an attempt that resumes from any of them finds its best step.
    """
    stored = stored_checkpoints(storage)
    newest = stored[:keep]
    best = {_best_of(storage, folder) for folder in newest} if with_best else set()
    return newest + [folder for folder in stored[keep:] if _step_of(folder) in best]


def _best_of(storage: Storage, folder: str) -> int | None:
    """The step with the lowest loss on data.validation when a checkpoint was saved; None without one."""
    try:
        manifest = read_manifest(storage, folder)
    except ManifestError:  # nobody resumes from it
        return None
    best = manifest.extra.get("best") if manifest else None
    return best if isinstance(best, int) else None


def _step_of(folder: str) -> int:
    match = CHECKPOINT_KEY.match(f"{folder}/")
    assert match is not None
    return int(match[1])


def checkpoint_folders(storage: Storage) -> list[str]:
    """Folders of all checkpoints, partial ones too, oldest first."""
    found = (CHECKPOINT_KEY.match(file.key) for file in storage.list(f"{CHECKPOINTS}/"))
    return sorted({match[0].rstrip("/") for match in found if match})

"""Names of the files that a run keeps under spec.output, and the list of its checkpoints."""

from __future__ import annotations

import re

from internvl_trainer.artifacts.manifest import MANIFEST
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
PREDICTIONS = "predictions"
SCORES = "scores.json"

ARTIFACTS = "artifacts"
EVALUATION = "evaluation.json"
HUB_CARD = "README.hub.md"
MODEL_CARD = "README.md"
REPORT = "report"
REPORT_PAGE = "index.html"
RUN_CONFIG = "run.yaml"
MODEL_FOLDERS = {"upstream": "model/", "hf": "model-hf/"}


def checkpoint_folder(step: int, epoch: int | None = None) -> str:
    """Where the checkpoint after `step` steps is, of the writer that has the output's lease with this epoch.

    Each writer has folders of its own: a late request of an earlier one never changes a checkpoint of a later one.
    """
    return f"{CHECKPOINTS}/step-{step:08d}" + ("" if epoch is None else f".{epoch:06d}")


def stored_checkpoints(storage: Storage) -> list[str]:
    """Folders of the checkpoints that have a manifest, newest first."""
    keys = (file.key for file in storage.list(f"{CHECKPOINTS}/") if file.key.endswith(f"/{MANIFEST}"))
    return sorted((key.removesuffix(f"/{MANIFEST}") for key in keys if CHECKPOINT_KEY.match(key)), reverse=True)

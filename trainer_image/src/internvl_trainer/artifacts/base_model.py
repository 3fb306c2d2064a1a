"""Which base model a run was trained on, so that what it made is never put on another one."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from internvl_trainer.artifacts.manifest import Manifest, sha256_of
from internvl_trainer.errors import UserError

_PARALLEL_FILES = 8  # hashing leaves Python's lock
_CONFIG = "config.json"


def base_digest(directory: Path) -> str:
    """Hex digest of a checkpoint's weights and config.json, wherever they came from."""
    files = sorted([*directory.glob("*.safetensors"), *directory.glob(_CONFIG)])
    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        lines = [f"{digest}  {file.name}" for file, digest in zip(files, pool.map(sha256_of, files), strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_base(directory: Path, source: str, trained: Manifest) -> None:
    """Raises UserError unless the directory holds the model that the manifest of the train stage was trained on."""
    recorded = trained.extra.get("base_sha256")
    if recorded is None:  # trained by a version that did not record it
        return
    if (found := base_digest(directory)) != recorded:
        raise UserError(
            "BaseModelChanged",
            f"{source} is not the model that was trained on: its digest is {found[:12]}, at the end of training it was "
            f"{recorded[:12]}. Give that model again (hf://organisation/name@commit names one revision for good), or "
            "train anew under another output",
            "spec.model.source",
        )

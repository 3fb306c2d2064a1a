"""How many tokens and tiles each row has: counted by preflight, which encodes every row anyway, read by training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from internvl_api.run_config import RunConfig
from safetensors.numpy import load, save_file

from internvl_trainer.artifacts.identity import fingerprint, stage_folder
from internvl_trainer.artifacts.manifest import read_manifest
from internvl_trainer.artifacts.storage import Storage

ROW_SIZES = "row-sizes.safetensors"

RowSizes = Mapping[str, np.ndarray]
"""Dataset to (rows, 2) int32: tokens and tiles of each row of its file that an epoch uses; 0 for a bad one."""


def write_row_sizes(path: Path, sizes: RowSizes) -> None:
    """8 bytes a row."""
    save_file(dict(sizes), path)


def read_row_sizes(config: RunConfig, storage: Storage) -> RowSizes | None:
    """What preflight counted for this very run; None when it has not."""
    folder = stage_folder("preflight")
    manifest = read_manifest(storage, folder)
    if manifest is None or manifest.fingerprint != fingerprint(config, "preflight"):
        return None
    return load(storage.read(f"{folder}/{ROW_SIZES}"))

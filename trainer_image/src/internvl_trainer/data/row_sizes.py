"""How many tokens and tiles each row has: counted by preflight, which encodes every row anyway, read by training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from internvl_api.run_config import RunConfig
from safetensors.numpy import load, save_file

from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.stage_store import StageStore

ROW_SIZES = "row-sizes.safetensors"

RowSizes = Mapping[str, np.ndarray]
"""Dataset to (rows, 2) int32: tokens and tiles of each row of its file that an epoch uses; 0 for a bad one."""


def write_row_sizes(path: Path, sizes: RowSizes) -> None:
    """8 bytes a row."""
    save_file(dict(sizes), path)


def read_row_sizes(config: RunConfig, storage: Storage) -> RowSizes | None:
    """What preflight counted for this very run; None when it has not."""
    stages = StageStore(config, storage)
    if stages.manifest("preflight") is None:
        return None
    return load(storage.read(stages.key("preflight", ROW_SIZES)))

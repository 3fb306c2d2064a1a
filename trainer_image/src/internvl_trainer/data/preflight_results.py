"""Results of the preflight stage that training reads: bad lines to skip, and the size of each row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from internvl_api.run_config import RunConfig
from safetensors.numpy import load, save_file

from internvl_trainer.artifacts.output_layout import PREFLIGHT
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.errors import UserError
from internvl_trainer.stage_store import StageStore

ROW_SIZES = "row-sizes.safetensors"

RowSizes = Mapping[str, np.ndarray]
"""Dataset to (rows, 2) int32 tokens and tiles of each row of its file that an epoch uses; 0 for a bad row."""


def write_row_sizes(path: Path, sizes: RowSizes) -> None:
    """Write the sizes to a file, 8 bytes a row."""
    save_file(dict(sizes), path)


def read_row_sizes(config: RunConfig, storage: Storage) -> RowSizes | None:
    """The sizes that this run's preflight counted; None when it has not run, or checked a sample of the rows."""
    stages = StageStore(config, storage)
    done = stages.manifest("preflight")
    if done is None or all(file.path != ROW_SIZES for file in done.files):
        return None
    return load(storage.read(stages.key("preflight", ROW_SIZES)))


def read_bad_lines(config: RunConfig, storage: Storage) -> dict[str, list[int]]:
    """Dataset to the lines that training skips; empty without `badRows: skip`.

    Raises:
        UserError: `badRows: skip` without a finished preflight.
    """
    if config.data.bad_rows != "skip":
        return {}
    stages = StageStore(config, storage)
    if stages.manifest("preflight") is None:
        raise UserError("PreflightMissing", "badRows: skip needs the list of the preflight stage; run it first")
    report = json.loads(storage.read(stages.key("preflight", PREFLIGHT)))
    lines: dict[str, list[int]] = report["skippedLines"]
    return lines

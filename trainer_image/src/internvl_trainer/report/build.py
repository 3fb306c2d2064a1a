"""The report of a run: written into its output by a stage, or into a folder by `internvl-trainer report`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.manifest import upload_files
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.report.page import render_page
from internvl_trainer.report.plots import DARK, LIGHT, draw_figures
from internvl_trainer.report.record import read_record
from internvl_trainer.report.samples import choose_samples

PAGE = "index.html"


def write_report(config: RunConfig, storage: Storage, folder: str) -> str:
    """Write the page and its PNGs under `folder` of the run's output; the URI of the page."""
    with tempfile.TemporaryDirectory(prefix="report-") as scratch:
        files = build_report(config, storage, Path(scratch))
        upload_files(storage, folder, {path.name: path for path in files})
    return f"{storage.uri}/{folder}/{PAGE}"


def build_report(config: RunConfig, storage: Storage, target: Path) -> list[Path]:
    """Write index.html, and the PNGs that are also in it, into `target`; what was written.

    Stages that have not run yet are left out. Raises UserError when storage cannot be read.
    """
    record = read_record(config, storage)
    target.mkdir(parents=True, exist_ok=True)
    figures = draw_figures(record, target, LIGHT)
    page = target / PAGE
    with tempfile.TemporaryDirectory(prefix="figures-") as scratch:
        dark = draw_figures(record, Path(scratch), DARK)
        text = render_page(record, choose_samples(record), figures, dark)
        page.write_text(text, encoding="utf-8", errors="replace")  # JSON can hold halves of surrogate pairs
    return [page, *figures]

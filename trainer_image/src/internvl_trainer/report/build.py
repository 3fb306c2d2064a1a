"""The report of a run: written into its output by a stage, or into a folder by `internvl-trainer report`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from internvl_trainer.artifacts.manifest import upload_files
from internvl_trainer.artifacts.output_layout import REPORT_PAGE
from internvl_trainer.report.contents import contents
from internvl_trainer.report.page import render_page
from internvl_trainer.report.plots import DARK, LIGHT, draw_plots
from internvl_trainer.report.record import read_record
from internvl_trainer.report.samples import choose_samples
from internvl_trainer.report.use_it import commands
from internvl_trainer.stage_store import StageStore


def write_report(stages: StageStore, folder: str) -> str:
    """Write the page and its PNGs under `folder` of the run's output; the URI of the page."""
    with tempfile.TemporaryDirectory(prefix="report-") as scratch:
        files = build_report(stages, Path(scratch))
        upload_files(stages.storage, folder, {path.name: path for path in files})
    return f"{stages.storage.uri}/{folder}/{REPORT_PAGE}"


def build_report(stages: StageStore, target: Path) -> list[Path]:
    """Write index.html, and the PNGs that are also in it, into `target`; what was written.

    Stages that have not run yet are left out. Raises UserError when storage cannot be read.
    """
    record = read_record(stages)
    target.mkdir(parents=True, exist_ok=True)
    plots = draw_plots(record, target, LIGHT)
    page = target / REPORT_PAGE
    with tempfile.TemporaryDirectory(prefix="figures-") as scratch:
        dark = draw_plots(record, Path(scratch), DARK)
        uses = commands(record, contents(stages))
        text = render_page(record, choose_samples(record), plots, dark, uses)
        page.write_text(text, encoding="utf-8", errors="replace")  # JSON can hold halves of surrogate pairs
    return [page, *plots]

"""`internvl-trainer report`: a page with the results of a run so far."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl_api.constants import ExitCode
from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.output_layout import MODEL_CARD
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.cli.options import CommandError, add_config, load_config, on_chosen_device
from internvl_trainer.data.checkpoint_tiling import follow_checkpoint
from internvl_trainer.distributed import prepare_environment
from internvl_trainer.stage_store import StageStore

DESCRIPTION = """\
Write the results of a run so far into a folder: index.html (open it in a browser), its pictures, and README.md, the
model card. The command reads the run's output and changes nothing there; while training goes on, the page shows the
newest checkpoint.
"""
EXAMPLES = """\
examples:
  internvl-trainer report --config run.yaml                   then open report/index.html
  internvl-trainer report --config run.yaml --out /tmp/coco

exit codes: 0 written   65 the output holds another run   69 storage away, or the folder cannot be written
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_config(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("report"), metavar="DIR", help="folder to write to (default: report)"
    )


def run(options: argparse.Namespace) -> int:
    """Write the report and print the paths of its files."""
    config = on_chosen_device(load_config(options.config))
    prepare_environment(config.device, 1)
    for path in write_report(config, options.out):
        print(path)
    return ExitCode.OK


def write_report(config: RunConfig, target: Path) -> list[Path]:
    """Write report and model card into `target`; what was written. Raises UserError and CommandError."""
    from internvl_trainer.report.build import build_report  # after prepare_environment: matplotlib reads its settings
    from internvl_trainer.report.model_card import model_card

    storage = open_storage(config.output, field="output")
    stages = StageStore(follow_checkpoint(config, storage), storage)
    stages.check_output()
    try:
        paths = build_report(stages, target)
        card = target / MODEL_CARD
        card.write_text(model_card(stages), encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{target} cannot be written: {error}", ExitCode.UNAVAILABLE) from error
    return [*paths, card]

"""`internvl-trainer report`: a page with the results of a run so far, or one that compares several runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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

`report compare` writes one page about several finished runs, from their outputs alone: settings that differ, curves of
loss, scores, time and GPU-hours.
"""
EXAMPLES = """\
examples:
  internvl-trainer report --config run.yaml                   then open report/index.html
  internvl-trainer report --config run.yaml --out /tmp/coco
  internvl-trainer report compare s3://models/coco-lora s3://models/coco-full --out comparison

exit codes: 0 written   65 the output holds another run   69 storage away, or the folder cannot be written
"""
_COMPARE = """\
Write one page that compares finished runs into a folder: index.html and its plot. Each run is named by its output, the
folder or address of its spec.output, and read from there alone; nothing is changed. The page shows a dash for
what a run lacks, as one without an evaluation lacks scores.
"""
_COMPARE_EXAMPLES = """\
examples:
  internvl-trainer report compare runs/coco-lora runs/coco-full           then open comparison/index.html
  internvl-trainer report compare s3://models/a s3://models/b s3://models/c --out /tmp/abc

in a cluster, on your own machine, with AWS_* as for the runs:
  internvl-trainer report compare $(kubectl get ivft A B -o jsonpath='{.items[*].spec.output}')

exit codes: 0 written   65 an address has no run, or a file there is broken   77 credentials refused
            69 storage away, or the folder cannot be written
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_config(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("report"), metavar="DIR", help="folder to write to (default: report)"
    )
    actions = parser.add_subparsers(dest="action", metavar="[compare OUTPUT …]")
    compare = actions.add_parser(
        "compare",
        help="compare finished runs on one page, from their outputs",
        description=_COMPARE,
        epilog=_COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument(
        "outputs", nargs="+", metavar="OUTPUT", help="a run's output: s3://, gs://, az://, pvc:// or a path"
    )
    compare.add_argument(
        "--out",
        dest="out",
        type=Path,
        default=Path("comparison"),
        metavar="DIR",
        help="folder to write to (default: comparison)",
    )


def run(options: argparse.Namespace) -> int:
    """Write the page and print the paths of its files."""
    if options.action == "compare":
        return _compare(options.outputs, options.out)
    config = on_chosen_device(load_config(options.config))
    prepare_environment(config.device, 1)
    for path in write_report(config, options.out):
        print(path)
    return ExitCode.OK


def _compare(outputs: Sequence[str], target: Path) -> int:
    """Write the page about several runs. Raises UserError and CommandError."""
    prepare_environment("cpu", 1)
    from internvl_trainer.report.compare_page import MOST_RUNS, write_comparison
    from internvl_trainer.report.run_outputs import read_results

    if not 1 < len(outputs) <= MOST_RUNS:
        message = f"report compare: found {len(outputs)} outputs, expected 2 to {MOST_RUNS}"
        raise CommandError(message, ExitCode.USER_ERROR)
    runs = [read_results(output) for output in outputs]
    try:
        paths = write_comparison(runs, target)
    except OSError as error:
        raise CommandError(f"{target} cannot be written: {error}", ExitCode.UNAVAILABLE) from error
    for path in paths:
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

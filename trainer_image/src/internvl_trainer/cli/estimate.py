"""`internvl-trainer estimate`: the memory that a run needs on each GPU."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from internvl_api.constants import ExitCode
from internvl_api.memory.advice import advice, largest_micro_batch
from internvl_api.memory.answering import evaluation_note
from internvl_api.memory.estimate import judge
from internvl_api.memory.setup import Setup, setup_of
from internvl_api.quantity import GIB, parse_bytes
from internvl_api.recipes.summary import estimate_lines, recipe_setup
from internvl_api.validation.violations import SpecError
from rich.console import Console
from rich.table import Table

from internvl_trainer.cli.options import CommandError, count, load_config

DESCRIPTION = """\
Estimate the memory that a run needs on each GPU, at each ZeRO stage, with rows of typical and of the longest allowed
length. Needs no GPU.
"""
EXAMPLES = """\
examples:
  internvl-trainer estimate --recipe internvl2-8b-lora --gpus 2 --gpu-memory 48Gi
  internvl-trainer estimate --config run.yaml --gpu-memory 80GB --micro-batch 2

exit codes: 0 fits, at least with typical rows   65 does not fit, or the model is not in the catalogue
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", metavar="NAME", help="a recipe, see `internvl-trainer recipes`")
    what.add_argument("--config", type=Path, metavar="RUN.YAML", help="a run's own configuration")
    parser.add_argument("--gpus", type=count, metavar="N", help="GPUs in all (default: the recipe's or the run's)")
    parser.add_argument(
        "--gpu-memory",
        type=_amount,
        default=80 * GIB,
        metavar="SIZE",
        help="memory of one GPU: 80Gi, 80GB, … (default: 80Gi)",
    )
    parser.add_argument(
        "--micro-batch", type=count, metavar="N", help="rows in one forward of one GPU (default: the recipe's)"
    )
    parser.add_argument(
        "--zero-stage", type=int, choices=(1, 2, 3), help="ZeRO stage of the advice; the table has all three"
    )


def run(options: argparse.Namespace) -> int:
    """Print the table and the advice; 65 when the run does not fit."""
    try:
        setup = _chosen_setup(options)
    except SpecError as error:
        raise CommandError(error.message, ExitCode.USER_ERROR) from error
    except LookupError as error:  # the recipe of a model that the estimate does not know
        raise CommandError(str(error), ExitCode.USER_ERROR) from error
    console = Console()
    code = _print_estimate(setup, options.gpu_memory, console)
    if options.config and (note := evaluation_note(load_config(options.config), options.gpu_memory)):
        console.print(note, highlight=False)
    return code


def _chosen_setup(options: argparse.Namespace) -> Setup:
    setup = recipe_setup(options.recipe) if options.recipe else _configured_setup(options.config)
    changes = {
        "world_size": options.gpus,
        "micro_batch": options.micro_batch,
        "zero_stage": options.zero_stage,
    }
    return replace(setup, **{name: value for name, value in changes.items() if value is not None})


def _configured_setup(path: Path) -> Setup:
    config = load_config(path)
    setup = setup_of(config)
    if setup is None:
        raise CommandError(
            f"{path}: found model.name {config.model.name!r}; an estimate needs a name of the catalogue, "
            "whose dimensions it starts from",
            ExitCode.USER_ERROR,
        )
    return setup


def _print_estimate(setup: Setup, gpu_memory: int, console: Console) -> int:
    found = judge(setup, gpu_memory)
    console.print(_estimate_table(setup))
    best = largest_micro_batch(setup, gpu_memory)
    console.print(f"ZeRO stage {setup.zero_stage}: {advice(found)}", highlight=False)
    if found.verdict == "fits" and best > setup.micro_batch:
        console.print(f"microBatchSize up to {best} would fit, with the same global batch.", highlight=False)
    return ExitCode.USER_ERROR if found.verdict == "does not fit" else ExitCode.OK


def _estimate_table(setup: Setup) -> Table:
    table = Table(
        title=f"{setup.model.name} on {setup.world_size} GPUs, micro batch {setup.micro_batch}: GiB a GPU, "
        f"with typical rows / with the longest allowed ({setup.max_seq_length} tokens)"
    )
    table.add_column("")
    for stage in (1, 2, 3):
        table.add_column(f"ZeRO-{stage}", justify="right", style="bold" if stage == setup.zero_stage else None)
    for line in estimate_lines(setup):
        cells = [f"{typical / GIB:.1f} / {longest / GIB:.1f}" for typical, longest in zip(*line[1:], strict=True)]
        if line.part == "total":
            table.add_section()
        table.add_row(line.part, *cells)
    return table


def _amount(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

"""`internvl-trainer recipes [show NAME]` and `internvl-trainer estimate`: what the package knows, printed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from internvl_api.advice import advice, largest_micro_batch
from internvl_api.constants import ExitCode
from internvl_api.estimate import Setup, judge, setup_of
from internvl_api.listing import chat_recipe_names, estimate_lines, model_facts, recipe_lines, recipe_setup, recipe_text
from internvl_api.quantity import GIB, gib, parse_bytes
from internvl_api.resolve import SpecError
from internvl_api.run_config import RunConfig
from pydantic import ValidationError
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from internvl_trainer.cli.config_file import explain

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_ESTIMATE_EXAMPLES = """\
examples:
  internvl-trainer estimate --recipe internvl2-8b-lora --gpus 2 --gpu-memory 48Gi
  internvl-trainer estimate --config run.yaml --gpu-memory 80GB --micro-batch 2

exit codes: 0 fits, at least with typical rows   65 does not fit, or the model is not in the catalogue
"""


def add_recipes_command(subparsers: Subparsers) -> None:
    """`recipes`; sets `func`, which takes the parsed options and gives the exit code."""
    parser = subparsers.add_parser("recipes", help="the named defaults: list them, or show one")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="every recipe in a line (the default)")
    show = actions.add_parser("show", help="one recipe, as it would be written in a CR")
    show.add_argument("name", metavar="NAME")
    parser.set_defaults(func=run_recipes)


def add_estimate_command(subparsers: Subparsers) -> None:
    """`estimate`; sets `func`, which takes the parsed options and gives the exit code."""
    parser = subparsers.add_parser(
        "estimate",
        help="memory that a run needs on each GPU, without a GPU",
        epilog=_ESTIMATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", metavar="NAME", help="a recipe, see `internvl-trainer recipes`")
    what.add_argument("--config", type=Path, metavar="RUN.YAML", help="a run's own configuration")
    parser.add_argument("--gpus", type=count, metavar="N", help="GPUs in all; default: the recipe's or the run's")
    parser.add_argument(
        "--gpu-memory", type=_amount, default=80 * GIB, metavar="SIZE", help="of one GPU: 80Gi, 80GB, …; default: 80Gi"
    )
    parser.add_argument("--micro-batch", type=count, metavar="N", help="rows in one forward of one GPU")
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), help="for the advice; the table has all three")
    parser.set_defaults(func=run_estimate)


def run_recipes(options: argparse.Namespace, console: Console | None = None) -> int:
    """List the recipes, or show the one named."""
    console = console or Console()
    if options.action != "show":
        console.print(_recipes_table())
        return ExitCode.OK
    return _or_message(lambda: _show_recipe(options.name, console))


def run_estimate(options: argparse.Namespace, console: Console | None = None) -> int:
    """Print the table and the advice; 65 when the run does not fit."""
    console = console or Console()
    return _or_message(lambda: _print_estimate(_chosen_setup(options), options.gpu_memory, console))


def _or_message(action: Callable[[], int]) -> int:
    try:
        return action()
    except SpecError as error:
        print(error.message, file=sys.stderr)
        return ExitCode.USER_ERROR
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return ExitCode.USER_ERROR
    except (OSError, yaml.YAMLError, ValidationError) as error:
        print(f"run.yaml cannot be used: {explain(error)}", file=sys.stderr)
        return ExitCode.CONFIG


def _chosen_setup(options: argparse.Namespace) -> Setup:
    setup = recipe_setup(options.recipe) if options.recipe else _configured_setup(options.config)
    changes = {
        "world_size": options.gpus,
        "micro_batch": options.micro_batch,
        "zero_stage": options.zero_stage,
    }
    return replace(setup, **{name: value for name, value in changes.items() if value is not None})


def _configured_setup(path: Path) -> Setup:
    config = RunConfig.load(path)
    setup = setup_of(config)
    if setup is None:
        raise LookupError(
            f"{path}: found model.name {config.model.name!r}; an estimate needs a name of the catalogue, "
            "whose dimensions it starts from"
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


def _recipes_table() -> Table:
    table = Table()
    for name in ("recipe", "model", "method"):
        table.add_column(name, overflow="fold")
    for name in ("GPUs", "ZeRO", "micro", "global", "lr", "tokens", "tiles"):
        table.add_column(name, justify="right")
    for line in recipe_lines():
        method = f"lora, rank {line.lora_rank}" if line.lora_rank else line.method
        figures = (line.gpus, line.zero_stage, line.micro_batch, line.global_batch, f"{line.learning_rate:g}")
        limits = (line.max_seq_length, line.max_dynamic_patch)
        table.add_row(line.name, line.model, method, *map(str, figures + limits))
    return table


def _show_recipe(name: str, console: Console) -> int:
    console.print(Syntax(recipe_text(name), "yaml", background_color="default"))
    if name not in chat_recipe_names():
        return ExitCode.OK  # nothing more is known of a model outside the catalogue
    facts = Table(show_header=False, box=None)
    for label, value in model_facts(name).items():
        facts.add_row(label, value)
    console.print(facts)
    found = judge(recipe_setup(name), 80 * GIB)
    console.print(
        f"memory a GPU on {found.setup.world_size} GPUs: {gib(found.typical.total)} with typical rows, "
        f"{gib(found.longest.total)} with the longest (see `internvl-trainer estimate`)",
        highlight=False,
    )
    return ExitCode.OK


def count(text: str) -> int:
    """An option that is a number of things."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected 1 or more")
    return value


def _amount(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

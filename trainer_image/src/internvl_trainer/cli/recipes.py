"""`internvl-trainer recipes [show NAME]`: the named defaults that ship with the package."""

from __future__ import annotations

import argparse

from internvl_api.constants import ExitCode
from internvl_api.memory.estimate import judge
from internvl_api.memory.quantity import GIB, gib
from internvl_api.recipes.summary import chat_recipe_names, model_facts, recipe_lines, recipe_setup, recipe_text
from internvl_api.validation.violations import SpecError
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from internvl_trainer.cli.options import CommandError

DESCRIPTION = """\
List the recipes, the published scripts' settings by name, or show one as it would be written in an InternVLFineTune.
"""
EXAMPLES = """\
examples:
  internvl-trainer recipes
  internvl-trainer recipes show internvl2-2b-lora-coco

exit codes: 0 printed   65 no recipe has that name
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="every recipe in a line (the default)")
    show = actions.add_parser("show", help="one recipe, as it would be written in an InternVLFineTune")
    show.add_argument("name", metavar="NAME")


def run(options: argparse.Namespace) -> int:
    """List the recipes, or show the one named."""
    console = Console()
    if options.action != "show":
        console.print(_recipes_table())
        return ExitCode.OK
    try:
        return _show_recipe(options.name, console)
    except SpecError as error:
        raise CommandError(error.message, ExitCode.USER_ERROR) from error


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

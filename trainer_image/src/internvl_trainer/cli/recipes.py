"""`internvl-trainer recipes [show NAME]`: the named defaults that ship with the package."""

from __future__ import annotations

import argparse

from internvl_api.constants import API_VERSION, KIND, ExitCode
from internvl_api.memory.estimate import judge
from internvl_api.quantity import GIB, gib
from internvl_api.recipes.summary import model_facts, recipe_config, recipe_lines, recipe_setup, recipe_text
from internvl_api.validation.violations import SpecError
from rich import box
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from internvl_trainer.cli.options import CommandError

_WIDE = 130  # columns of a terminal with room for model and method
DESCRIPTION = """\
List the recipes, the published scripts' settings by name, or print one as an InternVLFineTune: change its addresses,
and `kubectl apply` or `internvl-trainer resolve` takes it.
"""
EXAMPLES = """\
examples:
  internvl-trainer recipes
  internvl-trainer recipes show internvl2-2b-lora-coco
  internvl-trainer recipes show internvl2-2b-lora-coco > run-coco.yaml    with the facts about the model as comments

exit codes: 0 printed   65 no recipe has that name
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="every recipe in a line (the default)")
    show = actions.add_parser("show", help="one recipe, as an InternVLFineTune with all of its settings")
    show.add_argument("name", metavar="NAME")


def run(options: argparse.Namespace) -> int:
    """List the recipes, or show the one named."""
    console = Console()
    if options.action != "show":
        console.print(_recipes_table(console.width))
        return ExitCode.OK
    try:
        text = recipe_resource(options.name)
    except SpecError as error:
        raise CommandError(error.message, ExitCode.USER_ERROR) from error
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default").highlight(text), end="", soft_wrap=True)
    else:
        print(text, end="")
    return ExitCode.OK


def _recipes_table(width: int) -> Table:
    """Every recipe in a line; a narrow terminal gets fewer columns, never a broken name."""
    is_wide = width >= _WIDE
    table = Table() if is_wide else Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name in ("recipe", "model", "method") if is_wide else ("recipe",):
        table.add_column(name, no_wrap=True, overflow="ignore")
    for name in ("GPUs", "ZeRO", "micro", "global", "lr", "tokens", "tiles"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in recipe_lines():
        method = f"lora, rank {line.lora_rank}" if line.lora_rank else line.method
        figures = (line.gpus, line.zero_stage, line.micro_batch, line.global_batch, f"{line.learning_rate:g}")
        limits = (line.max_seq_length, line.max_dynamic_patch)
        table.add_row(*((line.name, line.model, method) if is_wide else (line.name,)), *map(str, figures + limits))
    return table


def recipe_resource(name: str) -> str:
    """A recipe as an InternVLFineTune that an API server takes, with facts about its model as comments.

    Raises SpecError for an unknown recipe.
    """
    source, _, settings = recipe_text(name).partition("spec:\n")
    kind = recipe_config(name).model.kind
    lines = [
        *source.splitlines(),
        *(f"# {each}" for each in (_facts(name) if kind == "chat" else ())),
        f"apiVersion: {API_VERSION}",
        f"kind: {KIND}",
        "metadata:",
        f"  name: {name}",
        "spec:",
        f"  recipe: {name}   # all below `output` repeats it: keep only what you change",
        "  data:",
        "    train:",
        "      mine:",
        "        annotation: s3://datasets/mine/train.jsonl   # yours",
        *([] if kind == "chat" else ["        format: flickr"]),
        f"  output: s3://models/{name}   # yours",
        *settings.splitlines(),
    ]
    return "\n".join(lines) + "\n"


def _facts(name: str) -> list[str]:
    found = judge(recipe_setup(name), 80 * GIB)
    facts = [f"{label}: {value}" for label, value in model_facts(name).items()]
    return [
        *facts,
        f"memory a GPU on {found.setup.world_size} GPUs: {gib(found.typical.total)} with typical rows, "
        f"{gib(found.longest.total)} with the longest (see `internvl-trainer estimate`)",
    ]

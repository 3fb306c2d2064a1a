"""Summaries of recipes and estimates, as rows for the command line and the documentation."""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

from internvl_api.memory.estimate import Memory, memory
from internvl_api.memory.setup import Setup, longest_row, setup_of, typical_row
from internvl_api.models.kinds import RETRIEVAL_MODELS
from internvl_api.recipes.files import load_recipe, read_recipe, recipe_names
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.run_config import RunConfig


class RecipeLine(NamedTuple):
    """Summary of a recipe. `lora_rank` is the language model's, 0 without an adapter."""

    name: str
    model: str
    method: str
    gpus: int
    zero_stage: int
    micro_batch: int
    global_batch: int
    learning_rate: float
    lora_rank: int
    max_seq_length: int
    max_dynamic_patch: int


class EstimateLine(NamedTuple):
    """Bytes of one part at ZeRO stages 1, 2, 3: with typical rows, and with the longest allowed."""

    part: str
    typical: tuple[int, int, int]
    longest: tuple[int, int, int]


def recipe_config(name: str) -> RunConfig:
    """The RunConfig of a recipe alone. Raises SpecError, with a hint, when there is no such recipe."""
    retrieves = load_recipe(name)["model"]["name"] in RETRIEVAL_MODELS if name in recipe_names() else False
    data = {"train": {"pairs": {"annotation": "/pairs", "format": "flickr"}}} if retrieves else {"meta": "/meta.json"}
    spec = parse_spec({"recipe": name, "data": data, "output": "/output"})
    return resolve(spec, job="recipes/" + name, job_uid="recipe")


@cache
def recipe_setup(name: str) -> Setup:
    """The estimate's input for a recipe. Raises SpecError for an unknown one, LookupError for an unknown model."""
    setup = setup_of(recipe_config(name))
    if setup is None:
        raise LookupError(f"recipe {name} names a model that is not in the catalogue")
    return setup


def recipe_lines() -> list[RecipeLine]:
    """A line for each recipe, sorted by name."""
    return [_recipe_line(name) for name in recipe_names()]


def _recipe_line(name: str) -> RecipeLine:
    config = recipe_config(name)
    training = config.training
    return RecipeLine(
        name=name,
        model=config.model.name or config.model.source,
        method=config.method,
        gpus=config.world_size,
        zero_stage=training.zero_stage,
        micro_batch=training.micro_batch_size,
        global_batch=training.global_batch_size,
        learning_rate=training.learning_rate,
        lora_rank=config.lora.language_rank if config.method == "lora" else 0,
        max_seq_length=training.max_seq_length,
        max_dynamic_patch=config.image.tiling.max_tiles,
    )


def recipe_text(name: str) -> str:
    """The recipe's YAML, with the comment that names its source. Raises SpecError for an unknown recipe."""
    recipe_config(name)  # raises for an unknown name
    return read_recipe(name)


def model_facts(name: str) -> dict[str, str]:
    """Facts about a recipe's model: label -> text."""
    setup = recipe_setup(name)
    model = setup.model
    facts = {
        "model": f"{model.name}, {model.parameters:,} parameters",
        "Hub repository": model.hub_repository,
        "vision tower": f"{model.vision.name}, {model.vision.parameters:,} parameters",
        "language model": f"{model.language.name}, {model.language.parameters:,} parameters",
        "template": model.template,
        "tiles": f"{model.tile_size} pixels, {model.context_tokens} tokens each, "
        f"at most {model.max_dynamic_patch} an image in the checkpoint's config.json",
        "trainable": f"{setup.trainable_parameters:,} parameters",
    }
    return facts | ({"caveat": model.caveat} if model.caveat else {})


def estimate_lines(setup: Setup) -> list[EstimateLine]:
    """Bytes that one GPU needs, by part and in total, for each ZeRO stage."""
    staged = [replace(setup, zero_stage=stage) for stage in (1, 2, 3)]
    typical = [memory(each, typical_row(each)) for each in staged]
    longest = [memory(each, longest_row(each)) for each in staged]
    parts = (*typical[0].parts, "total")
    return [EstimateLine(part, _of_part(typical, part), _of_part(longest, part)) for part in parts]


def _of_part(estimates: list[Memory], part: str) -> tuple[int, int, int]:
    first, second, third = (each.total if part == "total" else each.parts[part] for each in estimates)
    return first, second, third

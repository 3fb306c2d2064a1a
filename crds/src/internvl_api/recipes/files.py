"""Named defaults: one YAML file for each published fine-tuning script, in the words of the CR's spec."""

from functools import cache
from importlib import resources
from typing import Any

import yaml


@cache
def recipe_names() -> tuple[str, ...]:
    """Every recipe, sorted."""
    files = resources.files(__package__).iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def load_recipe(name: str) -> dict[str, Any]:
    """The partial spec a recipe stands for. Raises FileNotFoundError for an unknown name."""
    text = (resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)["spec"]
    return loaded

"""Recipes: one YAML file for each published fine-tuning script, a partial spec."""

from functools import cache
from importlib import resources
from typing import Any

import yaml


@cache
def recipe_names() -> tuple[str, ...]:
    """Names of all recipes, sorted."""
    files = resources.files(__package__).iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def read_recipe(name: str) -> str:
    """The recipe's YAML, with the comment that names its source. Raises FileNotFoundError for an unknown name."""
    return (resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(name: str) -> dict[str, Any]:
    """The partial spec of a recipe. Raises FileNotFoundError for an unknown name."""
    loaded: dict[str, Any] = yaml.safe_load(read_recipe(name))["spec"]
    return loaded


def with_recipe(written: dict[str, Any]) -> dict[str, Any]:
    """A raw spec over the settings of its recipe; unchanged when it names none."""
    name = written.get("recipe")
    return merge(_for_model(load_recipe(name), written), written) if isinstance(name, str) else written


def _for_model(recipe: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """The recipe; template and source only if the spec uses the recipe's model."""
    model = written.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if name in (None, recipe["model"]["name"]):
        return recipe
    own = {key: value for key, value in recipe["model"].items() if key not in ("name", "template", "source")}
    return recipe | {"model": own}


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` with the values of `over`: objects are merged key by key, everything else is replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged

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
    loaded: dict[str, Any] = yaml.load(read_recipe(name), Loader=yaml.CSafeLoader)["spec"]
    return loaded


def with_recipe(written: dict[str, Any]) -> dict[str, Any]:
    """A raw spec over the settings of its recipe; unchanged when it names none."""
    name = written.get("recipe")
    if not isinstance(name, str):
        return written
    recipe = _for_model(load_recipe(name), written)
    return merge(_for_evaluation(recipe) if written.get("method") == "none" else recipe, written)


def _for_model(recipe: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """The recipe; template and source only if the spec uses the recipe's model."""
    model = written.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if name in (None, recipe["model"]["name"]):
        return recipe
    own = {key: value for key, value in recipe["model"].items() if key not in ("name", "template", "source")}
    return recipe | {"model": own}


def _for_evaluation(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says about answering: the model, its pictures, its precision, and the pods; nothing of training."""
    kept = {
        "model": ("name", "template", "source"),
        "image": tuple(recipe.get("image", {})),
        "training": ("precision",),
    }
    sections = {
        section: {key: recipe[section][key] for key in keys if key in recipe[section]}
        for section, keys in kept.items()
        if section in recipe
    }
    return sections | {key: recipe[key] for key in ("workers", "gpusPerWorker") if key in recipe}


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` with the values of `over`: objects are merged key by key, everything else is replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged

"""The recipes for chat models, which several tests go through."""

from functools import cache

from internvl_api.recipes.files import recipe_names
from internvl_api.recipes.summary import recipe_config


@cache
def chat_recipe_names() -> tuple[str, ...]:
    return tuple(name for name in recipe_names() if recipe_config(name).model.kind == "chat")

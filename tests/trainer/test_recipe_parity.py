"""Every recipe is its script of upstream's, and every difference is one that docs/upstream-differences.md lists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chat_recipes import chat_recipe_names
from internvl_api.recipes.files import recipe_names
from internvl_api.recipes.summary import recipe_config, recipe_setup, recipe_text
from internvl_trainer.train.deepspeed_config import deepspeed_config, fit_buckets

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "upstream-differences.md").read_text(encoding="utf-8")
UPSTREAM: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "recipes.json").read_text(encoding="utf-8"))
LORA_SCRIPTS = "internvl_chat/shell/internvl2.5/2nd_finetune"
ABSENT = object()

# A script's argument, and where a run has it.
FIGURES = {
    "gpus": "world_size",
    "per_device_batch": "training.micro_batch_size",
    "grad_accum": "gradient_accumulation",
    "effective_global_batch": "training.global_batch_size",
    "conv_style": "model.template",
    "force_image_size": "image.tile_size",
    "max_dynamic_patch": "image.max_dynamic_patch",
    "dynamic_image_size": "image.dynamic",
    "use_thumbnail": "image.thumbnail",
    "drop_path_rate": "model.drop_path_rate",
    "freeze_backbone": "training.freeze.vision",
    "freeze_mlp": "training.freeze.projector",
    "freeze_llm": "training.freeze.language",
    "use_llm_lora": "lora.language_rank",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "learning_rate": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "warmup_ratio": "training.warmup_ratio",
    "lr_scheduler_type": "training.lr_schedule",
    "max_seq_length": "training.max_seq_length",
    "grad_checkpoint": "training.gradient_checkpointing",
    "group_by_length": "training.group_by_length",
    "dataloader_num_workers": "training.data_workers",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
}


@cache
def script_of(recipe: str) -> dict[str, Any]:
    """The figures of the script that a recipe names in its first line."""
    found = re.match(r"# (?:Derived: .*)?Figures of upstream's(?:\n#)? (\S+)\n", recipe_text(recipe))
    assert found, f"{recipe}.yaml does not name its script"
    script: dict[str, Any] = UPSTREAM["scripts"][found[1]]
    return script


def upstream_deepspeed(script: dict[str, Any]) -> dict[str, Any]:
    """Upstream's JSON file with what transformers' Trainer puts for "auto" (its max_grad_norm is 1 by default)."""
    settings = json.loads(json.dumps(UPSTREAM["deepspeed"][script["deepspeed"]]))
    settings["bf16"]["enabled"] = script["bf16"]
    settings["gradient_accumulation_steps"] = script["grad_accum"]
    settings["gradient_clipping"] = 1.0
    settings["train_batch_size"] = script["effective_global_batch"]
    settings["train_micro_batch_size_per_gpu"] = script["per_device_batch"]
    return dict(settings)


def leaves(settings: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


class Difference(NamedTuple):
    field: str
    upstream: Any
    here: Any


def differences(recipe: str) -> list[Difference]:
    """Leaves of the two DeepSpeed configurations that are not equal."""
    config = recipe_config(recipe)
    fitted = fit_buckets(deepspeed_config(config, config.world_size), recipe_setup(recipe).trainable_parameters)
    theirs, ours = dict(leaves(upstream_deepspeed(script_of(recipe)))), dict(leaves(fitted))
    pairs = (Difference(field, theirs.get(field, ABSENT), ours.get(field, ABSENT)) for field in {**theirs, **ours})
    return [pair for pair in pairs if pair.upstream != pair.here]


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of the document, without its head."""
    section = DOCUMENT.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip().strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


LISTED = {row[0].strip("`"): row for row in table("DeepSpeed's configuration")}
BEHAVIOUR = table("What training does") + table("Retrieval")


def listed_row(field: str) -> list[str] | None:
    parts = field.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((LISTED[prefix] for prefix in prefixes if prefix in LISTED), None)


def agrees(cell: str, value: Any) -> bool:
    """Whether a cell says this value; one in words, or of a whole object, is not compared."""
    if cell == "absent":
        return value is ABSENT
    if re.fullmatch(r"`[^{]*`", cell):
        return value is not ABSENT and bool(json.loads(cell.strip("`")) == value)
    return value is not ABSENT


@pytest.mark.parametrize("recipe", chat_recipe_names())
def test_every_difference_of_a_recipes_deepspeed_configuration_is_listed(recipe: str) -> None:
    for difference in differences(recipe):
        row = listed_row(difference.field)
        assert row is not None, f"{difference} is not in docs/upstream-differences.md"
        assert agrees(row[1], difference.upstream), (row, difference)
        assert agrees(row[2], difference.here), (row, difference)
        assert len(row) == 4
        assert row[3], "the reason is missing"


def test_every_listed_difference_is_there() -> None:
    found = [difference.field for recipe in chat_recipe_names() for difference in differences(recipe)]
    stale = [field for field in LISTED if not any(f"{name}.".startswith(f"{field}.") for name in found)]
    assert stale == []


def test_buckets_differ_only_where_less_than_a_whole_one_learns() -> None:
    for recipe in chat_recipe_names():
        fields = {difference.field for difference in differences(recipe)}
        small = recipe_setup(recipe).trainable_parameters < 1_000_000_000
        assert ("zero_optimization.reduce_bucket_size" in fields) == small, recipe


@pytest.mark.parametrize("recipe", chat_recipe_names())
def test_a_recipe_has_the_figures_of_its_script(recipe: str) -> None:
    script, config = script_of(recipe), recipe_config(recipe)

    def value(path: str) -> Any:
        found: Any = config
        for part in path.split("."):
            found = getattr(found, part)
        return found

    expected = {key: script[key] for key in FIGURES if key in script}
    assert {key: value(FIGURES[key]) for key in expected} == expected
    assert config.method == ("lora" if "use_llm_lora" in script else "full")
    assert config.precision == "bf16"
    assert ("max_steps" in script) == (config.training.max_steps is not None)


@pytest.mark.parametrize("recipe", chat_recipe_names())
def test_adamws_figures_are_upstreams(recipe: str) -> None:
    script, training = script_of(recipe), recipe_config(recipe).training
    parameters = UPSTREAM["deepspeed"][script["deepspeed"]]["optimizer"]["params"]
    assert list(training.adam_betas) == parameters["betas"]
    assert training.adam_epsilon == parameters["eps"]


def test_recipes_that_upstream_does_not_publish_are_listed_with_their_script() -> None:
    derived = [name for name in chat_recipe_names() if recipe_text(name).startswith("# Derived: ")]
    rows = table("Recipes that upstream does not publish")
    assert [name for name, _, _ in rows] == sorted((f"`{name}`" for name in derived), key=_size)
    for name, script, why in rows:
        assert UPSTREAM["scripts"][f"{LORA_SCRIPTS}/{script.strip('`')}"] == script_of(name.strip("`"))
        assert why


def _size(name: str) -> int:
    return int(re.findall(r"-(\d+)b-", name)[0])


def test_retrieval_scripts_that_say_bs1024_have_128() -> None:
    scripts = {name: script for name, script in UPSTREAM["scripts"].items() if re.search(r"bs1024.*4gpu", name)}
    assert {script["effective_global_batch"] for script in scripts.values()} == {128}
    names = [name for name in recipe_names() if re.match(r"internvl-14b-(head|lora)-", name)]
    assert {recipe_config(name).training.global_batch_size for name in names} == {128}
    assert len(scripts) == len(names) == 6


@pytest.mark.parametrize("row", [pytest.param(row, id=row[0]) for row in BEHAVIOUR])
def test_a_difference_in_behaviour_is_shown_by_a_test(row: list[str]) -> None:
    what, upstream, here, compat, shown_by = row
    assert what
    assert upstream
    assert here
    assert compat in ("yes", "no")
    file, _, name = shown_by.strip("`").partition("::")
    text = (ROOT / "tests" / "trainer" / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{shown_by} is not there"


@pytest.mark.parametrize("recipe", ["internvl-14b-head-coco", "internvl-14b-lora-coco"])
def test_where_guide_and_script_disagree_the_recipe_is_the_script(recipe: str) -> None:
    rows = [row for row in table("Where upstream's guide and its scripts disagree") if row[3] != row[2]]
    assert [row[3] for row in rows] == ["0.0", "`zero_stage3_config.json`"] * 2
    config = recipe_config(recipe)
    assert (config.model.drop_path_rate, config.training.zero_stage) == (0.0, 3)

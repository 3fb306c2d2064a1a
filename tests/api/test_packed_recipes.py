"""The domain-adaptation scripts of Mini-InternVL: packed, weighted by square root, ended by a number of steps."""

from __future__ import annotations

import itertools

import pytest
from chat_recipes import chat_recipe_names
from internvl_api.memory.setup import longest_row, typical_row
from internvl_api.recipes.summary import recipe_config, recipe_setup, recipe_text

SIZES = {"1b": ("Hermes-2", 2), "2b": ("internlm2-chat", 2), "4b": ("phi3-chat", 1)}  # template, epochs
DOMAINS = {"bdd": (240, 64, 8), "drivelm": (15_100, 8, 1), "medical": (2_200, 64, 8), "remote": (2_500, 64, 8)}
KEPT = {("2b", "bdd"): (72, 3), ("1b", "remote"): (500, 3), ("2b", "remote"): (500, 7)}  # else every 700 steps, 3


@pytest.mark.parametrize(("size", "domain"), list(itertools.product(SIZES, DOMAINS)))
def test_a_recipe_has_its_scripts_figures(size: str, domain: str) -> None:
    name = f"internvl2-{size}-full-{domain}"
    config, (template, epochs) = recipe_config(name), SIZES[size]
    steps, batch, accumulation = DOMAINS[domain]
    training, packing = config.training, config.training.packing
    assert (config.model.name, config.model.template) == (f"InternVL2-{size.upper()}", template)
    assert (training.epochs, training.max_steps) == (epochs, steps)
    assert (training.global_batch_size, training.micro_batch_size, config.gradient_accumulation) == (
        batch, 1, accumulation,
    )  # fmt: skip
    assert (packing.enabled, packing.max_tokens, packing.max_tiles, packing.buffer_size) == (True, 16384, 48, 20)
    assert (training.loss_weighting, training.max_seq_length, training.group_by_length) == ("square", 8192, False)
    assert (training.learning_rate, training.weight_decay, config.model.drop_path_rate) == (1e-5, 0.01, 0.1)
    assert not any((training.freeze.vision, training.freeze.projector, training.freeze.language))
    assert (config.checkpoint.every_steps, config.checkpoint.keep) == KEPT.get((size, domain), (700, 3))
    assert recipe_text(name).splitlines()[0].endswith(f"_finetune_{domain}.sh")


def test_only_these_recipes_pack() -> None:
    packed = {name for name in chat_recipe_names() if recipe_config(name).training.packing.enabled}
    assert packed == {f"internvl2-{size}-full-{domain}" for size in SIZES for domain in DOMAINS}
    derived = [name for name in chat_recipe_names() if recipe_text(name).startswith("# Derived: ")]
    assert len(chat_recipe_names()) - len(derived) == 57, "one for each published script"


def test_memory_is_reckoned_for_full_packs() -> None:
    setup = recipe_setup("internvl2-1b-full-bdd")
    assert typical_row(setup).tokens == longest_row(setup).tokens == 16384
    assert longest_row(setup).tiles == 48
    assert longest_row(setup).supervised == 16384 - 48 * 256

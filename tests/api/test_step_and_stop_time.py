"""How long a step and a stop take, and what a step sends over the network."""

from dataclasses import replace

import pytest
from internvl_api.memory.estimate import memory
from internvl_api.memory.setup import Row, longest_row, typical_row
from internvl_api.memory.step_time import bound_by_network, network_bytes, row_flops, step_seconds
from internvl_api.memory.stop_time import checkpoint_bytes, checkpoint_share, stop_seconds, stop_words
from internvl_api.models.retrieval import RETRIEVAL_CATALOGUE
from internvl_api.quantity import GIB
from internvl_api.recipes.summary import recipe_setup


@pytest.mark.parametrize(
    ("recipe", "nodes", "gigabytes", "seconds"),
    [
        pytest.param("internvl2-26b-full", 1, 240, 325, id="all of a checkpoint on one node"),
        pytest.param("internvl2-llama3-76b-full", 4, 849, 286, id="a quarter on each of four"),
        pytest.param("internvl2-llama3-76b-lora", 1, 2, 49, id="an adapter is small"),
    ],
)
def test_a_stop_is_a_step_and_the_nodes_share_of_a_checkpoint(
    recipe: str, nodes: int, gigabytes: int, seconds: int
) -> None:
    setup = recipe_setup(recipe)
    assert round(checkpoint_bytes(setup) / 1e9) == gigabytes
    assert stop_seconds(setup, nodes) == seconds
    assert stop_seconds(setup, nodes, storage_rate=0.1e9) > seconds
    assert f"{checkpoint_share(setup, nodes) / 1e9:.0f} GB of a checkpoint at 1 GB/s" in stop_words(setup, nodes)


@pytest.mark.parametrize(
    ("changes", "operations"),
    [
        pytest.param({}, 8, id="all weights, with recomputation"),
        pytest.param({"gradient_checkpointing": False}, 6, id="without recomputation"),
        pytest.param(
            {"learns_language": False, "language_rank": 16}, 6, id="an adapter needs no gradients of the base"
        ),
    ],
)
def test_operations_of_a_token_for_each_parameter(changes: dict[str, object], operations: int) -> None:
    setup = replace(recipe_setup("internvl2-llama3-76b-full"), **changes)
    body = setup.model.language.linear_parameters
    assert row_flops(setup, Row(1000, 0, 0)) == pytest.approx(operations * 1000 * body)


def test_longer_rows_take_longer() -> None:
    setup = recipe_setup("internvl3-8b-full")
    assert step_seconds(setup, longest_row(setup)) > 2 * step_seconds(setup, typical_row(setup))


@pytest.mark.parametrize(
    ("stage", "volumes"),
    [
        pytest.param(1, 3, id="an all-reduce, and the new weights"),
        pytest.param(2, 5, id="a reduction in each of four micro batches, and the new weights"),
        pytest.param(3, 12, id="weights twice and gradients once in each micro batch"),
    ],
)
def test_bytes_that_a_node_sends_in_a_step(stage: int, volumes: int) -> None:
    setup = replace(recipe_setup("internvl2-llama3-76b-full"), zero_stage=stage, learns_vision=True)
    assert setup.global_batch // (setup.world_size * setup.micro_batch) == 4
    gradients = 2 * setup.trainable_parameters
    assert network_bytes(setup, 4) == pytest.approx(volumes * gradients * 3 / 4)
    assert network_bytes(setup, 1) == 0, "one node has no network between its GPUs"


def test_the_largest_model_needs_more_than_a_hundred_gigabit_card() -> None:
    setup = recipe_setup("internvl2-llama3-76b-full")
    assert bound_by_network(setup, 4, 12.5e9) > 2
    assert bound_by_network(setup, 4, 200e9) < 1


def test_a_retrieval_model_is_estimated_as_its_card_says() -> None:
    model = RETRIEVAL_CATALOGUE["InternVL-14B-224px"]
    assert model.parameters / 1e9 == pytest.approx(13.84, abs=0.01)
    assert model.head_parameters / 1e9 == pytest.approx(0.2, abs=0.01), "what upstream's head and LoRA scripts train"
    full = recipe_setup("internvl-14b-full-flickr")
    first, second = (memory(replace(full, zero_stage=stage), typical_row(full)) for stage in (1, 2))
    assert first.total / GIB == pytest.approx(77, abs=1), "what upstream ran on 80 GB has next to no reserve"
    assert (first.total - second.total) / 1e9 == pytest.approx(26.8, abs=0.1)
    assert first.logits == 0, "no loss of this model reads its language head"


def test_head_and_adapter_of_a_retrieval_model_learn_little() -> None:
    head, lora = recipe_setup("internvl-14b-head-flickr"), recipe_setup("internvl-14b-lora-flickr")
    assert head.trainable_parameters == head.model.head_parameters
    assert lora.trainable_parameters == head.trainable_parameters + lora.adapter_parameters > head.trainable_parameters


def test_a_tile_without_a_context_token_divides_by_no_zero() -> None:
    setup = replace(recipe_setup("internvl2-26b-full"), tile_size=14)
    assert stop_seconds(setup, 1) > 0
    assert longest_row(replace(setup, pack=(16, 1))).tiles == 1

"""The table of docs/real-size.md, and that every published recipe fits the machines it is given."""

from pathlib import Path

import pytest
from internvl_api.memory.estimate import judge
from internvl_api.memory.real_size import CARD, Size, fill, sizes
from internvl_api.memory.stop_time import LONGEST_GRACE_SECONDS, grace_seconds, stop_seconds
from internvl_api.quantity import GIB
from internvl_api.recipes.files import recipe_names

DOCUMENTS = [Path(__file__).parents[2] / "docs" / name for name in ("real-size.md", "network.md")]


@pytest.fixture(scope="module")
def every_size() -> list[Size]:
    return sizes()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_document_has_the_table(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert fill(text) == text, "run `make generate`"
    assert "| internvl2-40b-full | 16 |" in text


def test_the_table_has_every_recipe_and_the_gpus_of_the_guides(every_size: list[Size]) -> None:
    assert {size.config.recipe for size in every_size} == set(recipe_names())
    gpus = [size.setup.world_size for size in every_size if size.config.recipe == "internvl2-40b-lora"]
    assert gpus == [2, 8]


def test_every_published_recipe_fits_80_gb_and_its_grace_period(every_size: list[Size]) -> None:
    for size in every_size:
        found = judge(size.setup, CARD)
        assert found.typical.total <= 0.9 * CARD, size.config.recipe
        stop = stop_seconds(size.setup, size.config.workers)
        grace = grace_seconds(None, size.config)
        assert grace is not None
        assert stop <= grace <= LONGEST_GRACE_SECONDS, size.config.recipe


def test_a_node_holds_what_it_is_given(every_size: list[Size]) -> None:
    """Of eight A100: 1.1 TiB of memory, 96 cores (AWS p4d.24xlarge); GCP's a2-highgpu-8g has 680 GB."""
    for size in every_size:
        assert size.needs.memory_bytes < 600 * GIB, size.config.recipe
        assert size.needs.cores <= 90, size.config.recipe

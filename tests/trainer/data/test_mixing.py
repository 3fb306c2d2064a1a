"""Mixtures: shares of an epoch, the order of rows, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.mixing import MixedRows, mixed_rows, split_exactly
from internvl_trainer.data.packing import PackedOrder, PackLimits
from internvl_trainer.data.sampler import GlobalOrder
from internvl_trainer.errors import UserError


def described(*weights: float | None) -> list[DatasetDescription]:
    return [DatasetDescription(f"d{place}", "/", "/a", weight=weight) for place, weight in enumerate(weights)]


def counts(mixed: MixedRows | None) -> list[int]:
    assert mixed is not None
    return mixed.counts.tolist()


@pytest.mark.parametrize(
    ("weights", "sizes", "temperature", "expected"),
    [
        pytest.param((1, 1), (900, 100), None, [500, 500], id="equal weights, whatever the sizes"),
        pytest.param((3, 1), (100, 100), None, [150, 50], id="three to one"),
        pytest.param((0.7, 0.2, 0.1), (5, 5, 1), None, [8, 2, 1], id="whole rows by largest remainder"),
        pytest.param((None, None), (900, 100), 1, [900, 100], id="temperature 1 is by size"),
        pytest.param((None, None), (900, 100), 2, [750, 250], id="temperature 2 is by the root of the size"),
        pytest.param((None, None), (900, 100), 1e9, [500, 500], id="a high temperature is even"),
        pytest.param((1, 1), (10, 0), None, [10, 0], id="an empty dataset"),
        pytest.param((1e308, 1e308), (10, 10), None, [10, 10], id="weights whose sum is infinite"),
    ],
)
def test_shares_of_an_epoch(
    weights: tuple[float | None, ...], sizes: tuple[int, ...], temperature: float | None, expected: list[int]
) -> None:
    mixed = mixed_rows(described(*weights), sizes, temperature, seed=1)
    assert counts(mixed) == expected
    assert mixed is not None
    edges = np.concatenate([[0], np.cumsum(sizes)])
    drawn = np.histogram(mixed(0), edges)[0] if 0 not in sizes else np.array(expected)
    assert drawn.tolist() == expected


def test_without_weights_every_row_comes_up_once() -> None:
    assert mixed_rows(described(None, None), (3, 4), None, seed=1) is None


def test_no_row_comes_up_again_before_the_others_of_its_dataset() -> None:
    mixed = MixedRows((7, 50), np.array([0.2, 0.8]), seed=3)
    drawn = np.concatenate([mixed(epoch) for epoch in range(9)])
    for first, size in ((0, 7), (7, 50)):
        own = np.bincount(drawn[(drawn >= first) & (drawn < first + size)] - first, minlength=size)
        assert own.max() - own.min() <= 1


def test_an_epoch_is_told_by_seed_and_number_alone() -> None:
    first, again = (MixedRows((7, 50), np.array([0.5, 0.5]), seed=3) for _ in range(2))
    first(0), first(1)
    assert first(2).tolist() == again(2).tolist()
    assert first(2).tolist() != MixedRows((7, 50), np.array([0.5, 0.5]), seed=4)(2).tolist()


def test_orders_draw_from_the_mixture_and_resume_in_it() -> None:
    mixed = MixedRows((7, 50), np.array([0.5, 0.5]), seed=3)
    whole = [position.row for step in range(30) for position in GlobalOrder(57, 4, 3, None, mixed).batch(step)]
    resumed = [position.row for position in GlobalOrder(57, 4, 3, None, mixed).batch(20)]
    assert resumed == whole[80:84]
    assert whole[:57] == mixed(0).tolist()


def test_packs_hold_the_mixture() -> None:
    mixed = MixedRows((7, 50), np.array([0.5, 0.5]), seed=3)
    sizes = np.full((57, 2), 1, np.int32)
    order = PackedOrder(sizes, PackLimits(8, 8, 4), 1, 3, mixed)
    drawn = [position.row for step in range(8) for pack in order.batch(step) for position in pack]
    assert sorted(drawn[:57]) == sorted(mixed(0).tolist())


@pytest.mark.parametrize(
    ("weights", "temperature", "message"),
    [
        ((1, None), None, "dataset 'd1' has no weight, others have one; give every dataset a weight, or none"),
        ((1, 2), 2.0, "datasets have weights; remove them or mixingTemperature"),
        ((1e-6, 1), None, "dataset 'd0' gets none of the 7 rows of an epoch; raise its weight, or leave it out"),
    ],
)
def test_contradictions_are_refused(weights: tuple[float | None, ...], temperature: float | None, message: str) -> None:
    with pytest.raises(UserError) as caught:
        mixed_rows(described(*weights), (3, 4), temperature, seed=1)
    assert caught.value.message == message


@pytest.mark.parametrize("total", [0, 1, 7, 1000])
def test_parts_sum_to_the_whole(total: int) -> None:
    assert split_exactly(total, np.array([0.1, 0.2, 0.7])).sum() == total

"""Micro-batches under a maximum of tokens: every row once, equally many on each rank, the same on any machine."""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from internvl_trainer.data.sampler import GlobalOrder, TokenBudget, cut_by_tokens


def parts(sizes: list[int], limit: int, most_rows: int, multiple: int) -> list[list[int]]:
    ends = cut_by_tokens(sizes, limit, most_rows, multiple)
    return [sizes[start:end] for start, end in pairwise([0, *ends])]


def test_a_micro_batch_closes_when_the_next_row_would_exceed_the_tokens() -> None:
    assert parts([3, 4, 5, 2, 2, 2, 9, 1], 9, 8, 1) == [[3, 4], [5, 2, 2], [2], [9], [1]]


def test_a_micro_batch_closes_at_the_most_rows() -> None:
    assert parts([1] * 6, 100, 4, 1) == [[1, 1, 1, 1], [1, 1]]


def test_a_longer_row_is_a_micro_batch_by_itself() -> None:
    assert parts([1, 12, 1], 10, 8, 1) == [[1], [12], [1]]


def test_the_largest_are_halved_until_every_rank_has_as_many() -> None:
    assert parts([1, 1, 2, 2, 9, 9], 9, 8, 2) == [[1, 1], [2, 2], [9], [9]] != parts([1, 1, 2, 2, 9, 9], 9, 8, 1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=16), st.integers(1, 60), st.integers(1, 8), st.integers(1, 4))
def test_every_row_comes_once_and_no_limit_is_exceeded(each: list[int], limit: int, rows: int, ranks: int) -> None:
    sizes = each * ranks
    found = parts(sizes, limit, rows, ranks)
    assert list(chain(*found)) == sizes
    assert len(found) % ranks == 0
    assert all(1 <= len(part) <= rows and (sum(part) <= limit or len(part) == 1) for part in found)


def test_ranks_share_the_batch_of_a_step_whenever_they_start() -> None:
    tokens = np.random.default_rng(0).integers(10, 100, 37)
    for ranks in (1, 2, 4):
        orders = [GlobalOrder(37, 8, seed=1, budget=TokenBudget(150, tokens)) for _ in range(ranks)]
        windows = [
            list(order.windows(5, 20, rank=rank, world_size=ranks, micro_batch=8 // ranks))
            for rank, order in enumerate(orders)
        ]
        for step, of_ranks in enumerate(zip(*windows, strict=True), 5):
            assert len({len(window) for window in of_ranks}) == 1
            dealt = [draw for parts in zip(*of_ranks, strict=True) for part in parts for draw in part]
            assert dealt == orders[0].batch(step)

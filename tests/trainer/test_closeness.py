"""What the tolerances let through, and what they do not."""

import pytest
import torch
from closeness import (
    ADAMW,
    GRADIENTS,
    LOSS,
    ROUNDING,
    Numbers,
    another_order,
    assert_close,
    assert_each_close,
    distance,
)
from golden import load, sample
from internvl_trainer.data.collate import collate

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_sums_in_another_order_are_close_whatever_their_size(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(64, 1000, generator=generator) * size for _ in range(2))
    wanted = torch.nn.functional.linear(rows, weight)
    with another_order():
        found = torch.nn.functional.linear(rows, weight)
    assert not torch.equal(found, wanted)
    assert_close(found, wanted)
    found[3, 5] += 2 * ROUNDING * float(wanted.abs().max())
    with pytest.raises(AssertionError):
        assert_close(found, wanted)


@pytest.mark.parametrize("within", [ROUNDING, LOSS, GRADIENTS, ADAMW])
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(6.19, 6.19 * (1 + 3e-7), id="a loss"),
        pytest.param([8.0, 1e-3], [8.0, 1e-3 + 2.9e-6], id="a small number beside large ones"),
        pytest.param([0.0, 0.0], [0.0, 0.0], id="nothing"),
    ],
)
def test_rounding_is_accepted(found: Numbers, expected: Numbers, within: float) -> None:
    assert_close(found, expected, within)


@pytest.mark.parametrize("within", [ROUNDING, LOSS, GRADIENTS, ADAMW])
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param([8.0, 1.0], [8.0, 1.001], id="one wrong number"),
        pytest.param([8.0, 1.0], [8.0008, 1.0001], id="another scale"),
        pytest.param([8.0, 1.0], [1.0, 8.0], id="another order"),
        pytest.param([1.0, NAN], [1.0, 1.0], id="no number"),
        pytest.param([1.0, 1.0], [1.0, NAN], id="no number to compare with"),
        pytest.param([1.0, INFINITE], [1.0, INFINITE], id="infinite"),
        pytest.param([1e-9], [0.0], id="something where nothing is expected"),
        pytest.param([1.0, 1.0], [1.0], id="another shape"),
    ],
)
def test_a_difference_is_refused(found: Numbers, expected: Numbers, within: float) -> None:
    with pytest.raises(AssertionError):
        assert_close(found, expected, within)


def test_the_difference_and_what_is_allowed_are_told() -> None:
    message = r"loss: differs by 1\.0e-03 of the largest value expected; allowed are 2e-06"
    with pytest.raises(AssertionError, match=message):
        assert_close(1.001, 1.0, LOSS, name="loss")


def test_each_counts_by_its_own_size() -> None:
    expected = {"large": [1000.0], "small": [1.0]}
    assert_each_close({"large": [1000.001], "small": [1.0]}, expected)
    with pytest.raises(AssertionError, match="small: differs"):
        assert_each_close({"large": [1000.0], "small": [1.001]}, expected)
    with pytest.raises(AssertionError):
        assert_each_close({"large": [1000.0]}, expected)


def test_what_is_nothing_beside_the_largest_may_be_rounding_alone() -> None:
    expected = {"weight": [1.0], "bias of keys": [1e-13]}
    assert_each_close({"weight": [1.0], "bias of keys": [-1e-12]}, expected)
    with pytest.raises(AssertionError, match="bias of keys: differs"):
        assert_each_close({"weight": [1.0], "bias of keys": [1e-9]}, expected)


def gradients(supervised: int) -> dict[str, torch.Tensor]:
    """Gradients when only the last `supervised` tokens of the answer carry labels; the row has a picture."""
    model, batch = load("qwen2").model.train(), collate([sample("qwen2/Hermes-2", 3)])
    places = (batch["labels"] != -100).nonzero()[:-supervised]
    batch["labels"][tuple(places.T)] = -100
    del batch["supervised"]
    model(**batch).loss_sum.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def test_gradients_of_another_processor_are_accepted_and_those_of_another_loss_are_not() -> None:
    wanted = gradients(supervised=4)
    with another_order():
        found = gradients(supervised=4)
    assert max(distance(found[name], wanted[name]) for name in wanted if name.endswith("lm_head.weight")) > 0
    assert_each_close(found, wanted, GRADIENTS)
    with pytest.raises(AssertionError):
        assert_each_close(gradients(supervised=3), wanted, GRADIENTS)

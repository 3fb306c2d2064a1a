"""How near two computations of the same numbers in fp32 have to be, whatever processor, threads or batch made them.

Each adds the same numbers in an order of its own, and rounds after each addition. So what differs is a share of the
largest numbers that were added, not of the result: tolerances here are shares of the largest value expected. Each is
more than three times what was seen with the kernels of PyTorch, oneDNN and MKL for AVX-512, AVX2 and SSE4, on one
thread and on two, and lets sums in random order pass; and it is well below the smallest fault that it has to find.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import functional

Numbers = torch.Tensor | np.ndarray | float | Sequence[float]

ROUNDING = 5e-6
"""For logits, features, merged weights: 42 units in the last place. Seen: 1.4e-6. Two vision layers swapped: 2e-5."""
LOSS = 2e-6
"""For a mean over tokens or pairs, where roundings cancel. Seen: 4e-7. One wrong token: 6e-4."""
GRADIENTS = 2e-5
"""For gradients, whose terms cancel in every layer. Seen: 4e-6. One token's label less: 0.1 where it counts most."""
ADAMW = 1e-5
"""For losses over a few AdamW steps. AdamW takes a full step, in either direction, for a gradient that is only rounding
noise. Seen: 2.3e-6, by one such weight. A learning rate 0.1 % higher: 3e-5."""

_NOTHING = 1e-6  # of the largest gradient of all: below is rounding alone, as of the keys' bias, which softmax cancels


def distance(found: Numbers, expected: Numbers) -> float:
    """The largest difference, as a share of the largest value expected."""
    ours, theirs = _exact(found), _exact(expected)
    return _largest_difference(ours, theirs, scale=_largest(theirs))


def assert_close(found: Numbers, expected: Numbers, within: float = ROUNDING, *, name: object = "it") -> None:
    """Fail where they differ by more than `within` of the largest value expected; also where one is not finite."""
    _check(distance(found, expected), within, name)


def assert_each_close(
    found: Mapping[str, Numbers] | Mapping[int, Numbers],
    expected: Mapping[str, Numbers] | Mapping[int, Numbers],
    within: float = ROUNDING,
) -> None:
    """The same of all under equal names, each by its own largest value."""
    assert found.keys() == expected.keys()
    pairs = {name: (_exact(found[name]), _exact(expected[name])) for name in expected}
    least = _NOTHING * max(_largest(theirs) for _, theirs in pairs.values())
    for name, (ours, theirs) in pairs.items():
        _check(_largest_difference(ours, theirs, scale=max(_largest(theirs), least)), within, name)


@contextmanager
def another_order(seed: int = 0) -> Iterator[None]:
    """Every linear layer adds in a random order, forwards and backwards, as another processor would in its own."""
    linear, generator = functional.linear, torch.Generator().manual_seed(seed)

    def shuffled(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        outputs, inputs = (torch.randperm(size, generator=generator) for size in weight.shape)
        mixed = linear(rows[..., inputs], weight[outputs][:, inputs], None if bias is None else bias[outputs])
        return mixed[..., outputs.argsort()]

    with patch.object(functional, "linear", shuffled):
        yield


def _exact(numbers: Numbers) -> torch.Tensor:
    return torch.as_tensor(numbers, dtype=torch.float64).detach()


def _largest(numbers: torch.Tensor) -> float:
    return float(numbers.abs().max())


def _largest_difference(ours: torch.Tensor, theirs: torch.Tensor, *, scale: float) -> float:
    assert ours.shape == theirs.shape, f"found shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
    difference = _largest(ours - theirs)
    return difference / scale if scale else difference and float("inf")


def _check(found: float, within: float, name: object) -> None:
    assert found <= within, f"{name}: differs by {found:.1e} of the largest value expected; allowed are {within:.0e}"
